# The two commands: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs/demo
METHODS ?= nope alibi rope fope
CONFIG := configs/quickstart.py

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PARITY := tests/interop/weights_parity_test.py
HARNESS := tests/evaluate/harness_parity_test.py

.PHONY: help demo test faults slow-test plan-test beam-test parity-test lm-eval-test lint install
.PHONY: clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train and compare $(METHODS) on books; writes $(RUNS)/report/index.html"
	@echo "make test       lint and the fast tests, with coverage"
	@echo "make faults     breaks runs in every way they must survive; prints a table (30 minutes)"
	@echo "make slow-test  the tests that take minutes"
	@echo "make plan-test  compiles the paper's sizes for three TPU slices; no TPU needed"
	@echo "make beam-test  tokenizes through Apache Beam, in an environment of its own"
	@echo "make parity-test  weights against transformers and PyTorch, in an environment of its own"
	@echo "make lm-eval-test  runs under lm-evaluation-harness, in an environment of its own"
	@echo "make lint       ruff and pyright"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[data,dev]'
	@touch $@

# glibc hands large buffers back to the kernel after every step and gets them again page by page,
# about a fifth of a small model's step on CPU. With these it keeps them; no number changes.
demo: export MALLOC_ARENA_MAX = 1
demo: export MALLOC_MMAP_MAX_ = 0
demo: export MALLOC_TRIM_THRESHOLD_ = 8000000000
demo: export MALLOC_TOP_PAD_ = 536870912
demo: $(INSTALLED)
	$(BIN)/fope data build --config $(CONFIG)
	@set -e; for method in $(METHODS); do \
	  $(BIN)/fope train --config $(CONFIG):position=$$method --workdir $(RUNS)/$$method; \
	  $(BIN)/fope evaluate --run $(RUNS)/$$method; \
	done
	$(BIN)/fope report $(METHODS:%=$(RUNS)/%) -o $(RUNS)/report

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m slipcover --source fope_jax --json --out .coverage.json -m pytest -n 2 --durations=10
	$(BIN)/python -m tests.coverage_gates .coverage.json

faults: $(INSTALLED)
	$(BIN)/python -m tests.faults

slow-test: $(INSTALLED)
	$(BIN)/pytest -m slow --ignore=$(PARITY) --ignore=$(HARNESS)

# With the TPU compiler installed jax would look for a TPU.
plan-test: export JAX_PLATFORMS = cpu
plan-test: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[tpu-compiler]'
	$(BIN)/pytest -m slow tests/tpu

parity-test:
	$(PYTHON) -m venv $(VENV)-parity
	$(VENV)-parity/bin/pip install --quiet --editable '.[dev,parity]'
	$(VENV)-parity/bin/pytest -m slow $(PARITY)

lm-eval-test:
	$(PYTHON) -m venv $(VENV)-harness
	$(VENV)-harness/bin/pip install --quiet --editable '.[dev,harness]'
	$(VENV)-harness/bin/pytest -m slow $(HARNESS)

beam-test:
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/pip install --quiet --constraint constraints-beam.txt --editable '.[beam,dev]'
	$(VENV)-beam/bin/pytest -m slow tests/data/beam_test.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(VENV)-beam $(VENV)-parity $(VENV)-harness runs data_cache .pytest_cache
