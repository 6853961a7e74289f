# make quickstart   the main job on a real model
# make test         all tests
# make lint         ruff, mypy, import contracts
# make test-peers   the oracles, live, in environments of their own
# make test-aot     the kernels, compiled for an H200 without one
# make bench        speed against the peers, and memory against depth
# Each from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test lint test-peers test-aot bench clean

quickstart: $(INSTALLED)
	$(BIN)/python -m experiments.quickstart

# Tests of one process use one core, most of the time.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal --durations=40 --durations-min=5

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "planish needs Python 3.12 or newer; $(PYTHON) is $$($(PYTHON) --version): run make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# The peers need Python 3.11, where torch has a CPU build.
PEERS_PYTHON ?= $(shell for p in "env PYENV_VERSION=3.11.7 python3" python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$p" && break; done)
PEERS := .venv-peers/.installed

$(PEERS): tests/peers/requirements.txt
	@test -n "$(PEERS_PYTHON)" || { echo "The peers need Python 3.11: make test-peers PEERS_PYTHON=/path/to/python3.11"; exit 1; }
	$(PEERS_PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== $<)"
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# GPTQModel and AutoAWQ, for their packing alone: what they ask for beside is not installed.
LAYOUTS := .venv-peers/.layouts
$(LAYOUTS): tests/peers/requirements-layouts.txt $(PEERS)
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77'
	BUILD_CUDA_EXT=0 .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation -r $<
	@touch $@

# compressed-tensors as it was when it kept pruned weights sparse.
SPARSE := .venv-sparse/.installed
$(SPARSE): tests/peers/requirements-sparse.txt
	@test -n "$(PEERS_PYTHON)" || { echo "The peers need Python 3.11: make test-peers PEERS_PYTHON=/path/to/python3.11"; exit 1; }
	$(PEERS_PYTHON) -m venv .venv-sparse
	.venv-sparse/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== $<)"
	.venv-sparse/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# llama.cpp, built from source: about ten minutes on two cores.
LLAMACPP := .venv-llamacpp/.installed
LEFT_OUT := LLAVA_BUILD LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_TESTS LLAMA_BUILD_SERVER \
  LLAMA_CURL
$(LLAMACPP): tests/peers/requirements-llamacpp.txt
	$(PYTHON) -m venv .venv-llamacpp
	CMAKE_ARGS="$(LEFT_OUT:%=-D%=OFF)" .venv-llamacpp/bin/python -m pip install --quiet \
	  --disable-pip-version-check -r $<
	@touch $@

test-peers: $(INSTALLED) $(PEERS) $(LAYOUTS) $(SPARSE) $(LLAMACPP)
	PLANISH_PEERS_PYTHON=$(CURDIR)/.venv-peers/bin/python \
	PLANISH_LAYOUTS_PYTHON=$(CURDIR)/.venv-peers/bin/python \
	PLANISH_SPARSE_PYTHON=$(CURDIR)/.venv-sparse/bin/python \
	PLANISH_LLAMACPP_PYTHON=$(CURDIR)/.venv-llamacpp/bin/python \
	  $(BIN)/python -m pytest tests/peers

# Kernels, compiled for an H200 on a machine that has no GPU: 1 GB of NVIDIA's packages.
AOT := .venv-aot/.installed
$(AOT): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  'jax[cuda13-local]' nvidia-cuda-nvcc==13.0.88 absl-py jaxtyping beartype pytest
	@touch $@

test-aot: $(AOT)
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -m aot tests/kernels

bench: $(INSTALLED) $(PEERS)
	$(BIN)/python -m experiments.benchmark peers_python=$(CURDIR)/.venv-peers/bin/python

clean:
	rm -rf $(VENV) .venv-peers .venv-sparse .venv-llamacpp .venv-aot .mypy_cache .ruff_cache .pytest_cache
