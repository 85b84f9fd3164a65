# Two commands: `make demo` runs the main job on a small real model, `make test` runs lint, types and tests.
# Both set up everything that they need in .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := .demo

.PHONY: demo test lint types clean

$(VENV)/ready: pyproject.toml constraints.txt
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

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
