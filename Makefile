# The two commands: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs/demo
METHODS ?= nope alibi rope fope
PRETRAINED ?= runs/pretrained
CONFIG := configs/quickstart.py

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PARITY := tests/interop/weights_parity_test.py tests/interop/gguf_parity_test.py
HARNESS := tests/evaluate/harness_parity_test.py

.PHONY: help demo demo-full pretrained-demo test faults slow-test plan-test beam-test parity-test lm-eval-test lint
.PHONY: install clean docs
.DEFAULT_GOAL := help

# Where it is set, every program would compile the package's sources anew at its start.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make demo       in five minutes: which of four methods finds and reads beyond its training"
	@echo "                length? Prints the verdict; writes $(RUNS)/report/index.html"
	@echo "make demo-full  $(METHODS) on books, larger, by all protocols; $(RUNS)-full/report"
	@echo "make pretrained-demo  SmolLM2 of 135 M parameters: what it writes, whether it finds a key, and"
	@echo "                what it loses beyond its 8,192 tokens; writes $(PRETRAINED)/report"
	@echo "make test       ruff and the fast tests, with coverage"
	@echo "make faults     breaks runs in every way they must survive; prints a table (30 minutes)"
	@echo "make slow-test  the tests that take minutes"
	@echo "make plan-test  compiles the paper's sizes for three TPU slices; no TPU needed"
	@echo "make beam-test  tokenizes through Apache Beam, in an environment of its own"
	@echo "make parity-test  weights against transformers and PyTorch, in an environment of its own"
	@echo "make lm-eval-test  runs under lm-evaluation-harness, in an environment of its own"
	@echo "make lint       ruff, shellcheck and pyright"
	@echo "make docs       the site, in site/"

install: $(INSTALLED)

# pip unpacks 3 GB of wheels on one core, uv on all of them, in a fifth of the time. uv reads no settings of
# pip, so those that say where packages lie go with it; where uv cannot install, pip does. Neither compiles:
# what is imported is compiled then, and all of TensorFlow and its like takes a minute.
define SETTINGS_OF_PIP
import re, sys
names = "index-url|extra-index-url|find-links|constraint"
for name, values in re.findall(rf"\.({names})='([^']*)'", sys.stdin.read()):
    print(*(f"--{name}={value}" for value in values.replace(r"\n", " ").split()))
endef
export SETTINGS_OF_PIP
PACKAGES := --quiet --constraint constraints.txt --editable '.[data,dev]'
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt uv && \
	  settings=$$($(BIN)/pip config list | $(BIN)/python -c "$$SETTINGS_OF_PIP") && \
	  $(BIN)/uv pip install --python $(BIN)/python --index-strategy unsafe-best-match $$settings $(PACKAGES) || \
	  $(BIN)/pip install --no-compile $(PACKAGES)
	@touch $@

# Recall and books with four methods, two runs at once, each on half of the cores; RUNS= writes
# elsewhere.
demo: export JAX_PLATFORMS ?= cpu
demo: $(INSTALLED)
	@began=$$(date +%s); set -e; \
	$(BIN)/fope data build --config $(CONFIG); \
	echo "the text is there after $$(($$(date +%s) - began)) s"; \
	$(BIN)/fope sweep experiments/demo/sweep.py --workdir $(RUNS) --jobs 2; \
	echo "the demo took $$(($$(date +%s) - began)) s"

# glibc hands large buffers back to the kernel after every step and gets them again page by page,
# about a fifth of a small model's step on CPU. With these it keeps them; no number changes.
demo-full: export MALLOC_ARENA_MAX = 1
demo-full: export MALLOC_MMAP_MAX_ = 0
demo-full: export MALLOC_TRIM_THRESHOLD_ = 8000000000
demo-full: export MALLOC_TOP_PAD_ = 536870912
demo-full: $(INSTALLED)
	$(BIN)/fope data build --config $(CONFIG)
	@set -e; for method in $(METHODS); do \
	  $(BIN)/fope train --config $(CONFIG):position=$$method --workdir $(RUNS)-full/$$method; \
	  $(BIN)/fope evaluate $(RUNS)-full/$$method --protocols all; \
	done
	$(BIN)/fope report $(METHODS:%=$(RUNS)-full/%) -o $(RUNS)-full/report

# Lengths are multiples of train.length, 8,192: a key in 2,048 and 4,096 tokens, and the loss of the
# same 2,048 tokens at the end of 8,192 and of 12,288 tokens, half as many again as it was trained on.
pretrained-demo: export JAX_PLATFORMS ?= cpu
pretrained-demo: EVALUATE = $(BIN)/fope evaluate $(PRETRAINED)/smollm2 --protocols
pretrained-demo: TEXT = same-tokens --config.evaluate.lengths=1,1.5 --config.evaluate.num_windows=1 \
  --config.evaluate.scored_tokens=2048
pretrained-demo: $(INSTALLED)
	$(BIN)/fope data download smollm2
	@test -f $(PRETRAINED)/smollm2/checkpoints/0/manifest.json || $(BIN)/fope import \
	  data_cache/downloads/SmolLM2-135M-Instruct.Q4_1.gguf --workdir $(PRETRAINED)/smollm2
	$(BIN)/fope data build --config $(PRETRAINED)/smollm2/config.json
	$(BIN)/fope generate $(PRETRAINED)/smollm2 "The history of the steam engine" --max-new-tokens 40
	$(EVALUATE) passkey --config.evaluate.passkey_lengths=0.25,0.5 --config.evaluate.passkey_trials=1 \
	  --config.evaluate.passkey_depths=0.1,0.5,0.9 --config.evaluate.passkey_templates=standard \
	  --config.evaluate.batch_tokens=4096
	$(EVALUATE) $(TEXT) --as same --as yarn:factor=2
	$(BIN)/fope report $(PRETRAINED)/smollm2 -o $(PRETRAINED)/report

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m slipcover --source fope_jax --json --out .coverage.json -m pytest -n 2 --durations=10
	$(BIN)/python -m tests.coverage_gates .coverage.json

faults: $(INSTALLED)
	$(BIN)/python -m tests.faults

slow-test: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[notebooks]'
	$(BIN)/pytest -m slow $(PARITY:%=--ignore=%) --ignore=$(HARNESS)

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
	$(BIN)/shellcheck -x -P tpu_scripts tpu_scripts/*.sh tpu_scripts/on_host/*.sh
	$(BIN)/pyright

# Warnings are errors; links and anchors are checked.
docs: export JAX_PLATFORMS = cpu
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "the site is site/index.html"

clean:
	rm -rf site $(VENV) $(VENV)-beam $(VENV)-parity $(VENV)-harness runs data_cache .pytest_cache
