# Everything runs in a virtual environment that is made here when it is missing: `make demo` and `make test` need
# nothing but Python 3.10 to 3.13. Overrides, for example:
#   make test PYTHON=python3.12 VENV=/somewhere/else    another interpreter, another place
#   make test PYTEST_ARGS='-m "not slow" -k linear'     a part of the tests
#   make demo DEMO_ARGS=--help

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
EXPERIMENTS_ARGS ?=

BIN := $(VENV)/bin
SPELLED := src tests docs benchmarks README.md CONTRIBUTING.md CHANGELOG.md Makefile mkdocs.yml pyproject.toml

.PHONY: help demo test lint format bench experiments docs clean
.DELETE_ON_ERROR:
.PRECIOUS: $(VENV)/.installed-%

help:  ## list what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo  ## train a small ViT and an MLP exactly and cheaply; writes demo.json, demo.png and report.html
	$(BIN)/cheapgrad demo $(DEMO_ARGS)

# One thread a worker: more workers than cores times threads would only wait for each other.
test: $(VENV)/.installed-dev  ## run all tests and the examples in the docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## check style, types, imports between rooms and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell $(wildcard $(SPELLED))

format: $(VENV)/.installed-dev  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## time layers and whole steps against exact ones
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

experiments: $(VENV)/.installed-dev  ## train small networks by every method; may be stopped and started again
	$(BIN)/python -m benchmarks.experiments $(EXPERIMENTS_ARGS)

docs: $(VENV)/.installed-docs  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean:  ## remove the environment, caches and built files (not what the demo wrote)
	rm -rf .venv build dist site .pytest_cache .ruff_cache .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Installed once per extra, and again when what is asked for has changed.
$(VENV)/.installed-%: pyproject.toml constraints.txt src/cheapgrad/_version.py | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	touch $@
