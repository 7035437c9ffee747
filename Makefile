# `make test` does all the set-up by itself; it needs Python >= 3.11 and pip.
# On a machine without a GPU, pip decides which torch build it takes: set PIP_EXTRA_INDEX_URL to PyTorch's
# CPU wheel index where the default would bring CUDA libraries.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo demo-real test test-gpu bench-gpu docs docs-look lint types test-versions clean

# LOCKED=1: with the versions of requirements.lock, which were tested together.
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCKED),-c requirements.lock) --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/mirage demo

demo-real: $(VENV)/.real
	$(BIN)/mirage demo --real

$(VENV)/.real: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,real]'
	touch $@

test: setup
	$(BIN)/python -m pytest -m 'not gpu' --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Everything of benchmarks/ that needs a GPU, in parts of at most ten minutes; those that are done are not run again.
bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py $(PARTS)

# The documentation as a site in build/site, which opens from the disk; warnings are errors, and nothing is fetched.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	touch $@

# Every page of it in Chromium, at desktop and phone width.
docs-look: docs
	$(BIN)/python tools/docs/look.py build/site

# Before a release: the unit tests with the lowest and with the highest versions that pyproject.toml allows, in environments
# of their own (3 GB each, one after the other). Writes the table of docs/versions.md and requirements.lock.
test-versions: setup
	$(BIN)/python -m tools.versions $(VERSIONS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/shellcheck --external-sources .ci/run launch/*.sh slurm/*.sh tests/browser/*.sh tests/slurm/*.sh
	$(BIN)/hadolint Dockerfile

types: setup
	$(BIN)/pyright

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
