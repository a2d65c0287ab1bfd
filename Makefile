# Everything a reader needs, from a fresh clone. The environment is made once, in .venv.
#
#   make demo    train on digits at batch 2 with eight methods, print the table, write a report
#   make test    the fast tests
#   make test-all  the other cases as well
#
#   make bench   time and memory beside torch's layers: CSV files and images in runs/bench
#
# PYTHON  the interpreter to build the environment with (3.10 to 3.13)
# TORCH   what to install as torch; `make test TORCH=torch` takes the newest build with CUDA

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2
DEMO ?=
BENCH ?=

BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-every test-slow test-zoo test-gpu test-browser check format bench bench-gpu docs package clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch comes first, so that the package's `torch>=2.6` never decides which build is taken.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[tools,cpu]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## compare eight methods at batch 2 on digits (DEMO="..." adds options)
	OMP_NUM_THREADS=1 $(BIN)/anybatch compare $(DEMO)

test: $(VENV)/.dev  ## fast tests, doctests and documentation examples
	$(PYTEST) -n $(WORKERS) --dist loadfile

test-all: $(VENV)/.dev  ## all tests with each pair of parameters, but trainings and other hardware
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not zoo and not combination"

test-every: $(VENV)/.dev  ## the same with each combination of parameters
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not zoo"

test-slow: $(VENV)/.dev  ## trainings and other tests that take minutes
	$(PYTEST) -n $(WORKERS) -m "slow and not gpu"

# Into an environment that has them: installing torchvision or timm here could replace torch.
test-zoo: $(VENV)/.dev  ## networks of torchvision, timm and segmentation-models-pytorch, if there
	$(PYTEST) -n $(WORKERS) -m zoo

test-gpu: $(VENV)/.dev  ## tests that need a CUDA device
	$(PYTEST) -n $(WORKERS) -m gpu

test-browser: $(VENV)/.dev  ## the reports in a headless Chromium
	$(PYTEST) -m browser

check: $(VENV)/.dev  ## lint, format check, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## layers, training steps, inference, memory, import: CSV and PNG in runs/bench
	$(BIN)/python benchmarks/all.py $(BENCH)

bench-gpu: $(VENV)/.dev  ## the same on a CUDA device, into runs/bench-gpu
	$(BIN)/python benchmarks/all.py --device cuda $(BENCH)

docs: $(VENV)/.dev  ## build the documentation into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# torch is installed in an environment of its own, once; then wheel and sdist, one after the other.
package: $(VENV)/.dev  ## build wheel and sdist, and try both in an empty environment
	rm -rf dist build/package
	$(BIN)/python -m build --quiet .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/package
	build/package/bin/python -m pip install --quiet "$(TORCH)" "hatchling>=1.25"
	cp tests/package/smoke.py build/smoke.py
	for file in dist/*.whl dist/*.tar.gz; do \
		build/package/bin/python -m pip install --quiet --no-deps --no-build-isolation \
			--force-reinstall $$file && (cd build && package/bin/python smoke.py) || exit 1; \
	done

clean:  ## remove the environment and every build product
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
