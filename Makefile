# Everything here works from a fresh clone with Python 3.11+ and pip only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE_VENV := .venv-engine
ENGINE_PIP := nice $(ENGINE_VENV)/bin/python -m pip --quiet --disable-pip-version-check
# One thread a process: the suite runs on small machines, and another number changes the last bits of sums.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: install quickstart test test-long check gpu-test gpu-test-2 engine-test docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# A few minutes on a laptop CPU: a real tiny target, two drafts, a report. Run again, it goes on.
quickstart: install
	HF_HUB_OFFLINE=1 $(BIN)/paceline quickstart

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -m "not gpu and not gpu2 and not engine and not long"

# Chaos and repetition: minutes to an hour.
test-long: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -m "long and not gpu and not gpu2 and not engine" --timeout 1800

# Needs a CUDA device and a Python that has torch; uses $(PYTHON) itself, not the CPU environment.
gpu-test:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m pytest -m gpu tests/gpu

# Needs two of them.
gpu-test-2:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m pytest -m gpu2 tests/gpu

# A real vLLM on a CPU, in a virtual environment of its own (2.5 GB, some minutes to install). A hash holds for all
# requirements of a call, so vLLM comes alone.
engine-test: $(VENV)/.installed-dev $(ENGINE_VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -m engine tests/engine

$(ENGINE_VENV)/.installed: constraints-engine.txt requirements-engine.txt
	test -x $(ENGINE_VENV)/bin/python || $(PYTHON) -m venv $(ENGINE_VENV)
	$(ENGINE_PIP) install --require-hashes --no-deps -r requirements-engine.txt
	$(ENGINE_PIP) install -r constraints-engine.txt
	$(ENGINE_PIP) uninstall --yes triton  # of no use on a CPU, and 1 GB
	touch $@

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	MYPYPATH=src:benchmarks $(BIN)/mypy --explicit-package-bases benchmarks/*.py
	$(BIN)/lint-imports

# The configuration reference is made from the schema; the other pages are written by hand.
docs: install
	$(BIN)/python benchmarks/make_config_reference.py docs/configuration.md

clean:
	rm -rf $(VENV) $(ENGINE_VENV) build dist .pytest_cache .mypy_cache .ruff_cache
