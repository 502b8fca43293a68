# The two commands of the README. They need Python 3.11 or newer, pip and make, and nothing else.
#
#   make demo    build .venv, install excite, run the main job on the embedded data
#   make test    build .venv, install excite with its test extra, run ruff, mypy and pytest
#
#   PYTHON=python3.12           the interpreter that .venv is built from
#   PIP_ARGS="--index-url URL"  passed to pip install. On Linux a plain install of torch brings its CUDA build (some
#                               5 GB on disk); without a GPU, an index with torch's CPU build saves most of that.
#   PYTEST_ARGS="-k spec -x"    passed to pytest

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# A stamp says: installed, and pyproject.toml has not changed since. The package itself is installed editable, so that
# a change to the code needs no new install.
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_TESTS := $(VENV)/.installed-for-tests

.PHONY: help demo test

help:
	@sed -n 's/^#  \{1,3\}\(.*\)/\1/p' Makefile

demo: $(INSTALLED)
	$(BIN)/excite compare

test: $(INSTALLED_FOR_TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST_ARGS)

$(INSTALLED): pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install $(PIP_ARGS) -e .
	@touch $@

# The test extra holds all that the demo needs, so its install counts for both.
$(INSTALLED_FOR_TESTS): pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[test]'
	@touch $(INSTALLED) $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys' || { echo "No Python here: '$(PYTHON)' does not run. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "excite needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
			"Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
