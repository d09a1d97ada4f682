# Two commands from a fresh clone: `make picture PROMPT="..."` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a red sailboat on a calm sea at sunset

.PHONY: picture test test-browser test-all test-cuda gpu-report bench lint types floors clean

# torch first and pinned: a bare `torch` would fetch gigabytes of CUDA.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.picture: setup.cfg constraints.txt | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.test: setup.cfg constraints.txt | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.picture

picture: $(VENV)/.picture
	$(BIN)/txt2img --prompt "$(PROMPT)"

# Neighbours share what their file or room makes: each process begins with a half of the tests, whole, and then
# takes from the end of what the other has left.
WORKERS := -n 2 --dist worksteal

test: $(VENV)/.test
	$(BIN)/python -m pytest $(WORKERS)

# The page in Chromium; skipped, with the reason, where there is none.
test-browser: $(VENV)/.test
	$(BIN)/python -m pytest -m browser tests/serve/test_browser.py

test-all: $(VENV)/.test
	$(BIN)/python -m pytest $(WORKERS) -m "not cuda"

# With a torch that knows CUDA; LDM_TEST_DEVICE=cpu rehearses it on the processor.
test-cuda: $(VENV)/.test
	$(BIN)/python -m pytest -m cuda tests/cuda

gpu-report: $(VENV)/.test
	bash scripts/gpu_report.sh

$(VENV)/.bench: setup.cfg constraints.txt | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,bench]'
	@touch $@ $(VENV)/.test $(VENV)/.picture

# `make bench BENCH=` measures all that there is, which takes hours.
BENCH ?= --quick
bench: $(VENV)/.bench
	$(BIN)/python scripts/bench.py $(BENCH)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

floors: $(VENV)/.test
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
