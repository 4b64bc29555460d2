# Two commands for a fresh clone: `make quickstart` and `make test`. Both set up .venv first and print what they do.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# glibc returns large buffers to the system after every step and faults them in again; keeping them makes CPU training
# up to 1.6x faster (docs/benchmarks.md). Harmless elsewhere.
export MALLOC_MMAP_THRESHOLD_ ?= 4000000000
export MALLOC_TRIM_THRESHOLD_ ?= 8000000000
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart test bench lint types docs clean
help:
	@echo "make quickstart  set up $(VENV), train, unlearn, evaluate and report on the embedded world (no network hub)"
	@echo "make test        set up $(VENV) and run the tests"
	@echo "make bench [DATA=folder]"
	@echo "                 time and memory against named baselines, a leak check and, with a folder of TOFU, its padding"
	@echo "make lint types  ruff and mypy;  make docs  the documentation;  make clean  remove what make created"

$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV): python -m venv, pip install -e .[dev] with constraints.txt"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

quickstart: $(STAMP)
	@echo "== hf-unlearn quickstart: output in outputs/quickstart"
	$(BIN)/hf-unlearn quickstart --output_dir outputs/quickstart

# One thread a process: two processes on two cores whose threads wait for each other take up to half as long again.
test: $(STAMP)
	@echo "== pytest: all tests, one process a core"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q

bench: $(STAMP)
	@echo "== benchmarks: output in outputs/bench.json"
	$(BIN)/python tests/benchmarks/bench.py --output outputs/bench.json $(if $(DATA),--data "$(DATA)")

lint: $(STAMP)
	@echo "== ruff"
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)
	@echo "== mypy"
	$(BIN)/mypy hf_unlearn tests

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist *.egg-info
