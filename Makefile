# On a machine that has only Python (3.11 or newer, with venv): `make demo`, `make test`, `make bench`.
# Each target sets up its own part of one virtual environment, again only after pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
BENCH ?=
# Held at one version, so that tests and figures of different days are of the same peer.
TORCH := "torch==2.13.0"
# One more than the two cores of a small machine, as many tests wait.
SIDE_BY_SIDE ?= --numprocesses 3 --dist worksteal
ON_EACH_BACKEND := tests/integration -m "not any_backend"
BIN := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python keeps what it has compiled, whatever it is told elsewhere: the tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test bench docs format clean

help:
	@echo "make demo    train on real Sentinel-2 tiles and compare the loaders (about two minutes after the downloads)"
	@echo "make test    ruff, mypy, pytest on JAX, torch and TensorFlow"
	@echo "make bench   compare with the other data loaders; BENCH=--quick for a short run"
	@echo "make docs    build the site of guides and API into site/"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove $(VENV) and the caches"
	@echo "PYTHON=python3.12 chooses the interpreter, VENV=folder the environment"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + \
		"; choose one: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-examples: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[examples]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH) --editable ".[dev]"
	@touch $@

$(VENV)/.installed-bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH) --editable ".[bench]"
	@touch $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/satellite.py

# The last line is that of the run of all tests, on TensorFlow; Keras has one backend in a process.
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	KERAS_BACKEND=jax $(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ON_EACH_BACKEND)
	KERAS_BACKEND=torch $(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ON_EACH_BACKEND)
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest $(SIDE_BY_SIDE)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(BENCH)

# The variable silences a notice about the successor of mkdocs, which is no fault of the pages.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
