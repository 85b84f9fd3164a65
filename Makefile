# `make demo` runs the main job on a small real model, `make test` runs lint, types and tests; `make gpu-check` is for a
# machine with a GPU: are the kernels right there, and how fast? Each sets up everything that it needs in .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := .demo

.PHONY: demo test lint types gpu-check clean

$(VENV)/ready: pyproject.toml constraints.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/quantlab quantize demo --recipe w4-gptq --out $(DEMO)/w4-gptq --overwrite
	$(BIN)/quantlab eval $(DEMO)/w4-gptq --against demo --text builtin:eval --windows 8 --report $(DEMO)/report.md

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/ready
	$(BIN)/mypy

gpu-check: $(VENV)/ready
	$(BIN)/python -m quantlab_kernels.gpu.gpu_check --out gpu-check.json

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
