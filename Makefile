# On a machine with nothing but Python: `make quickstart`, `make test`, `make check`.
# On a GPU machine, with the running python3 and no network: `make test-gpu`, `make bench`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 3
QUICKSTART ?= quickstart
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.DELETE_ON_ERROR:
.PHONY: help quickstart test check check-triton test-gpu bench bench-cpu bench-gpu

help:
	@grep -E '^# |^[a-z-]+:.*##' Makefile | sed -E 's/^# //; s/^([a-z-]+):.*## */  make \1: /'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[dev]'
	touch $(VENV)/.installed $@

quickstart: $(VENV)/.installed ## train a small Mamba and let it write (MINUTES=3 QUICKSTART=folder)
	$(BIN)/mambalm quickstart --minutes $(MINUTES) --output $(QUICKSTART)

test: $(VENV)/.installed-dev ## every test that needs no GPU
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.installed-dev ## lint, format, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

check-triton: $(VENV)/.installed-dev ## compile the kernels of every op with every Triton from 3.6 on, without a GPU
	$(BIN)/python -m tests.ops.triton_versions all

test-gpu: ## the tests that need a GPU
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu

bench: ## speed and memory of every op, each result behind a check that it is right
	PYTHONPATH=src $(PYTHON) -m benchmarks

bench-cpu: ## on a CPU, beside transformers (LLAMA=python with llama-cpp-python): prompts, decoding, training, growing lengths
	for name in "cpu --models mamba-130m mamba-370m mamba2-130m" cpu_length; \
	do PYTHONPATH=src $(PYTHON) -m benchmarks.$$name $(if $(LLAMA),--llama $(LLAMA)) || exit; done
	PYTHONPATH=src $(PYTHON) -m benchmarks.cpu_training

bench-gpu: ## on a GPU: every op beside its floor and peers, whole models, decoding, a million tokens
	for name in selective_scan ssd causal_conv1d rms_norm "models --mode prefill" "models --mode training" decode long_prompt; \
	do PYTHONPATH=src $(PYTHON) -m benchmarks.$$name || exit; done
