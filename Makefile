# Everything here sets itself up: a virtual environment in .venv, the packages of constraints.txt,
# and data in a cache outside the repository. The second run is fast.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
CORPUS := $(BIN)/python -m benchmarks.corpus.fetch

# The name of the stamp says what was installed, so that a change of either file installs anew and
# nothing else does.
INSTALLED := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')

# Two test processes with one thread each fill two cores.
export OPENBLAS_NUM_THREADS ?= 1
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint corpus clean

help: ## Say what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## Make .venv with everything in it

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,formats,zoo,dev]'
	@rm -f $(VENV)/installed-*
	@touch $@

demo: $(INSTALLED) ## Fetch a few small real models and ask where they came from
	@$(CORPUS) --demo
	@$(BIN)/python -m docs.demo

test: lint ## Fetch the core of the corpus, run all checks and all tests
	$(CORPUS) --core
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(INSTALLED) ## Run the formatter's check, the linter, the type checker, the layer check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

corpus: $(INSTALLED) ## Fetch the whole corpus (1.2 GB) and score the answers on it
	$(CORPUS) --all
	$(BIN)/python -m benchmarks.corpus.score

clean: ## Remove what was made here; the cache of fetched models stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
