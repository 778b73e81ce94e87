# One environment, .venv, made from the lock requirements-cpu.txt.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
.DEFAULT_GOAL := help
.PHONY: help install demo test quick gpu lint lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make .venv from the lock

# --no-deps: the lock is complete, and leaves out torchvision, torchaudio and torchcodec, whose
# only builds are for CUDA. PyTorch's own index is asked for its CPU build where it answers.
$(STAMP): requirements-cpu.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "tokay needs Python 3.11: set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3.11-venv"; exit 2; }
	@echo "Installing into $(VENV) (about 3 minutes, once) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@extra=$$($(PYTHON) -c 'import urllib.request as u; u.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=3); print("--extra-index-url https://download.pytorch.org/whl/cpu")' 2>/dev/null); \
	  $(BIN)/pip install -qq --disable-pip-version-check --no-deps $$extra -r requirements-cpu.txt
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## search the documentation of this Python environment, end to end (10 minutes)
	@$(BIN)/tokay demo

test: $(STAMP)  ## every test that needs no GPU (11 to 17 minutes)
	@$(BIN)/pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

quick: $(STAMP)  ## the tests that start no engine (under 90 seconds)
	@$(BIN)/pytest -m "not gpu and not slow"

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

# Of the GPU lock every package has a wheel for this platform, or there is no lock: nodes build nothing.
lock:  ## resolve both locks anew (needs uv)
	uv pip compile pyproject.toml --extra cpu --extra dev --override cpu-overrides.txt \
	  --python-version 3.11 --no-header -o requirements-cpu.txt
	sed -i 's/^torch==\(.*\)+cpu$$/torch==\1/' requirements-cpu.txt
	uv pip compile pyproject.toml --extra gpu --python-version 3.11 --only-binary :all: \
	  --python-platform x86_64-manylinux_2_31 --no-header -o requirements.txt

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
