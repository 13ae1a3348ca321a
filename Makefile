# One virtual environment for everything: beside torch, the development tools weigh next to nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLOT := runs/results/demo/report/frontier.png

.DEFAULT_GOAL := help
.PHONY: help demo test check venv clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## run the demo sweep and say where its plot is; run again, it takes seconds
	$(BIN)/gqa-run -m +sweeps=demo
	@echo "plot: $(PLOT)"

test: $(STAMP) ## run the fast tests
	$(BIN)/pytest --numprocesses 2

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

venv: $(STAMP) ## create .venv, with the exact versions of constraints.txt (the other targets do it too)

# torch comes first, under its pin alone: what else is installed cannot bring in another version of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean: ## remove caches and all that runs produced: runs/, with its store and results
	rm -rf runs outputs multirun wandb build .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV) *.egg-info
