# make search | fast | test | long | lint | docs | bench | install: each does all of its own set-up in .venv; a second call installs nothing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: search fast test long lint docs site bench install clean
.DEFAULT_GOAL := search

search: install
	@$(BIN)/python -m hybridnas.search space=mamba_moe $(ARGS)

# bytecode is kept: without it every process that tests start compiles the package again
fast test long: export PYTHONDONTWRITEBYTECODE =
fast: install
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(ARGS)

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)
	$(if $(ARGS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m interpreter tests/kernels)

# what takes half a minute or more: kills at random, two hosts, whole pages and examples
long: install
	$(BIN)/python -m pytest -n auto --dist load -m long $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# docs serves the site and follows changes; site builds it with warnings as errors (--quiet would hide them from --strict)
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install
	$(BIN)/python -m hybridnas.bench $(ARGS)

install: $(VENV)/.installed

# torch first and by itself: with it in place, nothing else pulls a larger build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("hybridnas needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; name another with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
