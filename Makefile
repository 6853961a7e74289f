# make quickstart   the main job on a real model
# make test         all tests
# make lint         ruff, mypy, import contracts
# make test-peers   the oracles, live, in an environment of their own
# make bench        speed against the peers, and memory against depth
# Each from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test lint test-peers bench clean

quickstart: $(INSTALLED)
	$(BIN)/python -m experiments.quickstart

# Tests of one process use one core, most of the time.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

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

test-peers: $(INSTALLED) $(PEERS)
	PLANISH_PEERS_PYTHON=$(CURDIR)/.venv-peers/bin/python $(BIN)/python -m pytest tests/peers

bench: $(INSTALLED) $(PEERS)
	$(BIN)/python -m experiments.benchmark peers_python=$(CURDIR)/.venv-peers/bin/python

clean:
	rm -rf $(VENV) .venv-peers .mypy_cache .ruff_cache .pytest_cache
