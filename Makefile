# Needs Python 3.10 to 3.13 with pip. Everything that is installed or downloaded stays in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# For instance: make test PYTEST_ARGS="-m 'not integration'"
PYTEST_ARGS ?=
# Tests run side by side, each on one core; the tests of a file stay together, since they share what they have trained.
TEST_WORKERS ?= 2
# For instance, to leave out CUDA: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=

export PIP_CACHE_DIR := $(abspath $(VENV))/cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1
BIN := $(VENV)/bin

.PHONY: demo test lint install clean
.DEFAULT_GOAL := test
# A half-made environment must not pass for a finished one.
.DELETE_ON_ERROR:

demo: install
	$(BIN)/nnunet_dyn demo --overwrite

test: install
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile --max-worker-restart 0 $(PYTEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The sources as they are now, as a user would install them. Without build/, whose deleted modules would come along.
install: $(VENV)/.synced
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	rm -rf build

$(VENV)/.synced: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install $(PIP_ARGS) '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.synced
	$(BIN)/python -m pip install $(PIP_ARGS) '.[dev]'
	touch $@

# Some distributions leave ensurepip out of Python; the pip beside it can then put itself in.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $@ install pip; }

clean:
	rm -rf $(VENV) build dist nnunet_dyn.egg-info .pytest_cache .ruff_cache demo_output
	find nnunet_dyn tests -name __pycache__ -type d -prune -exec rm -rf {} +
