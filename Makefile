# `make demo` and `make test` need nothing but Python 3.11+ and network access to a package index:
# the first of them creates .venv, a later one reuses it until pyproject.toml or constraints.txt change.

PY ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt --build-constraints constraints.txt
# uv does not read pip's setting for local wheels, so hand it on; empty is harmless.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Python is started a hundred times by the suite: modules are compiled once, also where that is switched off.
export PYTHONDONTWRITEBYTECODE :=
# No test and no demo may reach for the network, and two test workers share the cores.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SUITE = OMP_NUM_THREADS=1 $(OFFLINE) $(1)/python -m pytest -n 2
PYTEST = $(call SUITE,$(BIN))
# What test-newest and test-oldest move, each with a range in pyproject.toml; the last two follow the others.
MOVED := transformers diffusers trl peft accelerate tokenizers huggingface-hub

.PHONY: demo test test-slow test-newest test-oldest test-gpu check fix docs clean
.DEFAULT_GOAL := demo
.DELETE_ON_ERROR:

demo: .venv/.stamp
	$(OFFLINE) $(BIN)/tersor demo

test: .venv/.stamp .venv/.vision-stamp
	$(PYTEST)
	PYTHONPATH=.venv/vision $(PYTEST) tests_timm

test-slow: .venv/.stamp
	$(PYTEST) -m slow

# The suite with the newest or the oldest releases that pyproject.toml allows of what is MOVED; the rest is as pinned.
test-newest test-oldest: test-%: .venv/.stamp
	$(BIN)/uv venv -q --clear --python $(BIN)/python .venv-$*
	$(BIN)/python .ci/releases.py $* $(MOVED) > .venv-$*/constraints.txt
	$(BIN)/uv pip install -q --python .venv-$*/bin/python -c .venv-$*/constraints.txt \
		--build-constraints constraints.txt -e '.[dev]'
	@$(BIN)/uv pip show --python .venv-$*/bin/python torch $(MOVED) | grep -E '^(Name|Version)'
	$(call SUITE,.venv-$*/bin)

# On a CUDA device, and not in Triton's interpreter.
test-gpu: .venv/.stamp
	TRITON_INTERPRET=0 $(OFFLINE) $(BIN)/python -m pytest -m gpu

check: .venv/.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: .venv/.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/.docs-stamp
	$(BIN)/mkdocs build --strict

clean:
	rm -rf tersor-report site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# One rule for the whole environment, so that a parallel make installs once. The stamp goes first and comes last:
# an interrupted installation leaves none, and a .venv whose Python does not start is made anew.
.venv/.stamp: pyproject.toml constraints.txt
	@rm -f $@
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tersor needs Python 3.11 or newer: make PY=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PY) -m venv --clear .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	$(INSTALL) -e '.[dev]'
	@touch $@

# timm with torchvision, in a folder that only its tests see: a torchvision that was built for another torch breaks
# transformers' imports as soon as it is installed.
.venv/.vision-stamp: .venv/.stamp
	$(INSTALL) --no-deps --target .venv/vision timm torchvision
	@touch $@

.venv/.docs-stamp: .venv/.stamp
	$(INSTALL) -e '.[docs]'
	@touch $@
