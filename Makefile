# One environment, .venv, made from the lock requirements-cpu.txt.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
.DEFAULT_GOAL := help
.PHONY: help install demo test chaos quick fuzz mutate coverage gpu lint lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make .venv from the lock

# --no-deps: the locks are complete, and leave out torchvision, torchaudio and torchcodec, whose
# only builds are for CUDA. Every file is a wheel whose hash is in a lock, so none is built here and
# no other package index can put one in its place. torch's CPU build is on PyTorch's own index: the
# page of that one package is asked, where it answers, and for that one package.
TORCH_BUILDS ?= https://download.pytorch.org/whl/cpu/torch/
PIP := $(BIN)/pip install -qq --disable-pip-version-check --no-deps
LOCKED := $(PIP) --require-hashes --only-binary :all:

$(STAMP): requirements-cpu.txt requirements-cpu-torch.txt pyproject.toml
	@test ! -L $(VENV) || { echo "$(VENV) is a link to another checkout's: run make there"; exit 2; }
	@command -v $(PYTHON) >/dev/null || { echo "tokay needs Python 3.11: set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3.11-venv"; exit 2; }
	@echo "Installing into $(VENV) (about 3 minutes, once) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@page=$$($(PYTHON) -c 'import urllib.request as u; u.urlopen("$(TORCH_BUILDS)", timeout=3); print("--no-index --find-links $(TORCH_BUILDS)")' 2>/dev/null); \
	  $(LOCKED) $$page -r requirements-cpu-torch.txt
	@$(LOCKED) -r requirements-cpu.txt
	@$(PIP) --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## search the documentation of this Python environment, end to end (10 minutes)
	@$(BIN)/tokay demo

test: $(STAMP)  ## every test that needs no GPU, but for `make chaos` (some 23 minutes)
	@$(BIN)/pytest -m "not gpu and not chaos" -n 2 --dist loadfile --no-loadscope-reorder

chaos: $(STAMP)  ## storage, workers, nodes and drivers that fail again and again (some 10 minutes)
	@$(BIN)/pytest -m "chaos and not gpu" -n 2 --dist loadfile

quick: $(STAMP)  ## the tests that start no engine and do not fuzz (some 5 minutes)
	@$(BIN)/pytest -m "not gpu and not slow and not chaos" -n 2 --dist loadfile --ignore tests/fuzz

fuzz: $(STAMP)  ## the readers against random input, ten times what `make test` tries (about 20 minutes)
	@TOKAY_FUZZ=1 $(BIN)/pytest tests/fuzz -n 2

# Tools that are in no lock: uv lays them over .venv's packages for one command.
BESIDE := $(BIN)/uv run -q --no-project --python $(BIN)/python

mutate: $(STAMP)  ## small changes of what decides on labels, vectors and rows: which does no test notice
	@OMP_NUM_THREADS=1 $(BESIDE) --with mutmut==3.8.1 python tests/mutate.py $(MODULE)

# TESTS names others than the unit tests: `make coverage TESTS=tests` measures all of them.
TESTS ?= tests/unit
coverage: $(STAMP)  ## how much of the code the unit tests run, file by file
	@$(BESIDE) --with pytest-cov==7.1.0 python -m pytest $(TESTS) -m "not gpu" -n 2 --dist loadfile \
	  --cov=cluster --cov=actors --cov=pipelines --cov=serving --cov-report=term:skip-covered

# Another interpreter (PYTHON=...) takes the place of .venv's: nothing is installed, and what it
# lacks is skipped. CORPUS names a folder in BEIR's layout; OPTIONS are those of the script.
gpu:  ## tests and figures of this machine's GPU, as a table (at most 15 minutes)
	@$(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py \
	  $(if $(CORPUS),--corpus "$(CORPUS)") $(OPTIONS)

lint: $(STAMP)  ## ruff, mypy, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every package of both locks has a wheel, or there is no lock: nothing is built where it is installed.
# torch's CPU build stands in a lock of its own, because it does not come from where the rest does.
COMPILE := $(BIN)/uv pip compile -q --python-version 3.11 --no-header --generate-hashes --only-binary :all:

lock:  ## resolve the locks anew (TORCH_BUILDS: a page or a folder with PyTorch's CPU builds)
	@test -x $(BIN)/uv || { echo "uv is missing: make install"; exit 2; }
	$(COMPILE) pyproject.toml --extra cpu --extra dev --override cpu-overrides.txt \
	  --find-links $(TORCH_BUILDS) --no-emit-package torch -o requirements-cpu.txt
	sed -n 's/^ *"\(torch==[^"]*\)",/\1+cpu/p' pyproject.toml | $(COMPILE) - --no-annotate \
	  --find-links $(TORCH_BUILDS) | awk '/^[a-z]/ {torch = /^torch==/} torch' >requirements-cpu-torch.txt
	$(COMPILE) pyproject.toml --extra gpu --python-platform x86_64-manylinux_2_31 -o requirements.txt

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
