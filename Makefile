# Two commands for a fresh clone: `make demo` (the runtime alone) and `make test` (everything that must hold).

PYTHON ?= python3
PIP_INSTALL = bin/pip install --quiet --disable-pip-version-check

.PHONY: demo test check lint types docs unit fast oldest clean

demo: .venv-demo/ready
	.venv-demo/bin/u2moe transcribe --stream

test: lint types docs unit oldest

# What to run before every commit: about a minute once the environment is there.
check: lint types fast

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/ready
	cd .venv && bin/mypy --config-file ../pyproject.toml -p u2moe

# NO_MKDOCS_2_WARNING: mkdocs-material advertises its successor in a banner on every build.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict

# A process for each core; the tests of a file share what its fixtures made.
unit: .venv/ready
	.venv/bin/pytest -n auto --dist loadfile

fast: .venv/ready
	.venv/bin/pytest -n auto --dist loadfile -m 'not slow' --ignore tests/server

# The lowest onnxruntime that the graphs and the runtime are promised to run with.
oldest: .venv-oldest/ready
	.venv-oldest/bin/u2moe transcribe

# Not editable: what is checked and tested is what ships. The stamp depends on every packaged file.
SOURCES = pyproject.toml $(shell git ls-files export runtime quantize benchmarks)

.venv/ready: $(SOURCES)
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/$(PIP_INSTALL) '.[cpu,dev]'
	.venv/$(PIP_INSTALL) --no-deps --force-reinstall .
	touch $@

.venv-demo/ready: $(SOURCES)
	test -d .venv-demo || $(PYTHON) -m venv .venv-demo
	.venv-demo/$(PIP_INSTALL) '.[cpu]'
	.venv-demo/$(PIP_INSTALL) --no-deps --force-reinstall .
	touch $@

.venv-oldest/ready: $(SOURCES)
	test -d .venv-oldest || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/$(PIP_INSTALL) . onnxruntime==1.17.0 'numpy<2'
	.venv-oldest/$(PIP_INSTALL) --no-deps --force-reinstall .
	touch $@

clean:
	rm -rf site .venv .venv-demo .venv-oldest build *.egg-info
