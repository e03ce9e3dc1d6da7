# `make help` lists the targets. Only Python 3.11 to 3.13, git and make are needed beforehand.
#
#   PYTHON=python3.12 make test      another interpreter for the environment
#   make train ARGS="seed=1"         settings for train.py; for the test targets, arguments for pytest
#   JOBS=4 make test                 test processes

# The first that runs, is of a supported version and can make environments. A name on the PATH need not run (pyenv).
USABLE := import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	"$$name" -c '$(USABLE)' 2>/dev/null && echo "$$name" && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2
ARGS   ?=

# Test processes share the cores; torch would otherwise start as many threads as there are cores in each of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format bench soak gpu clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1: \2/p' $(firstword $(MAKEFILE_LIST)) 

setup: $(STAMP) ## make .venv and install, again only where pyproject.toml or constraints.txt changed

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(USABLE)' 2>/dev/null || { echo "error: no usable Python ($(PYTHON)): install Python 3.11, 3.12 or" \
		"3.13 with its venv module (python3-venv on Debian and Ubuntu), or give PYTHON=PATH" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(STAMP) ## set up, then train the miniature through every stage on CPU
	$(BIN)/python train.py $(ARGS)

# In the order of their folders, so that files of few long tests begin first and no process is left alone with one.
test: $(STAMP) ## set up, then run the test suite
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## set up, then style, types, layers and spelling
	@failed=; for check in "ruff check ." "ruff format --check ." "mypy" "lint-imports --no-logo" "codespell ."; do \
		echo "== $$check"; $(BIN)/$$check || failed="$$failed [$$check]"; done; \
		test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

format: $(STAMP) ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure: every tests/benchmarks/bench_*.py
	@set -e; found=no; for file in tests/benchmarks/bench_*.py; do \
		test -f "$$file" || continue; found=yes; echo "== $$file"; \
		OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python "$$file" $(ARGS); \
	done; test $$found = yes || echo "there is no benchmark yet: tests/benchmarks/ holds no bench_*.py"

soak: $(STAMP) ## tests that take minutes
	$(PYTEST) -m soak $(ARGS)

gpu: $(STAMP) ## on a CUDA device: its tests, then figures of speed and equality in gpu.json
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)
	$(BIN)/python -m tests.gpu.check

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
