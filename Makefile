# Two commands set up everything in a fresh clone: `make train` and `make test`.
PYTHON ?= python3
WORKERS ?= 2
PRESET ?= quick
WORKDIR ?= runs/$(PRESET)

VENV := .venv
BIN := $(VENV)/bin
# The stamp is touched only after pip has succeeded: an interrupted install is started afresh by the next `make`.
STAMP := $(VENV)/.installed
AOT := $(VENV)/.installed-aot
# One process a core compiles nearly twice as fast as one process with two threads: XLA compiles on a single thread.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10

# XLA's CPU client allocates a step's buffers anew each time; with huge pages that costs a twentieth of a step, not a fifth.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install train test test-slow lint smoke312 clean

help:  ## print this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "error: dsv3_jax needs Python 3.11 or newer, but $(PYTHON) is %d.%d; try: make PYTHON=/path/to/python3.11" % v[:2])'
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	@echo "installing dsv3_jax and its test tools into $(VENV) (once; one to three minutes) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[tests]'
	@touch $@

install: $(STAMP)  ## create .venv with the package and the test tools

train: $(STAMP)  ## train a small DeepSeek-V3 on real text (PRESET=quick WORKDIR=runs/quick); continues a run that was stopped
	$(HUGE_PAGES) $(BIN)/python -m experiments.train --preset=$(PRESET) --workdir=$(WORKDIR) --resume

test: $(STAMP)  ## the fast tests (under 12 minutes on 2 cores)
	$(PYTEST) -m "not slow"

# Apart from the environment's packages: wherever JAX finds libtpu it looks for TPUs, slowly and aloud; likewise for GPUs.
$(AOT): $(STAMP)
	@echo "installing compilers for TPU and GPU into $(VENV) (once; for ahead-of-time compilation) ..."
	@rm -rf $(VENV)/aot $(VENV)/aot-gpu
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --target $(VENV)/aot libtpu
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --target $(VENV)/aot-gpu \
	  jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-nvdisasm
	@touch $@

test-slow: $(STAMP) $(AOT)  ## the slow tests (under 50 minutes on 2 cores)
	$(PYTEST) -m slow

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# `python3.12` may be a shim that refuses to start, so every candidate is tried.
smoke312:  ## tests/smoke on Python 3.12 with the newest JAX, where that interpreter is present
	@py=; for c in python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python; do \
	  "$$c" -c '' >/dev/null 2>&1 && { py=$$c; break; }; done; \
	if [ -z "$$py" ]; then echo "smoke312: no Python 3.12 on this machine, nothing to run"; exit 0; fi; \
	set -e; rm -rf .venv312; "$$py" -m venv .venv312; \
	echo "smoke312: installing the newest JAX for $$(.venv312/bin/python --version) into .venv312 ..."; \
	grep -vE '^(jax|jaxlib)==' constraints.txt > .venv312/constraints.txt; \
	.venv312/bin/python -m pip install -q --disable-pip-version-check -c .venv312/constraints.txt -e '.[tests]'; \
	.venv312/bin/python -c 'import jax; print("smoke312: jax", jax.__version__)'; \
	.venv312/bin/python -m pytest tests/smoke

clean:  ## remove the virtual environments and caches (never runs/)
	rm -rf .venv .venv312 .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info build
	find . -name __pycache__ -prune -exec rm -rf {} +
