# Every target makes its own environment (.venv, or $FUSIONLAB_VENV) on first use; a second run starts at once.
SHELL := /bin/bash
VENV := $(or $(FUSIONLAB_VENV),.venv)
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml | sha256sum | cut -c1-16)

# PYTHONPATH: an environment that another checkout made may point there, and tests start programs elsewhere
PYTEST := PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: help
help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -c 'from fusionlab.blocks import kernels; kernels.compile_all()'
	@rm -f $(VENV)/.installed-*
	@touch $@

.PHONY: install
install: $(STAMP) ## make the environment

.PHONY: demo
demo: $(STAMP) ## fine-tune, fuse and evaluate the embedded default (two minutes)
	$(BIN)/python -m fusionlab fit

.PHONY: test
test: $(STAMP) ## the tests: CPU, offline, one process a core
	$(PYTEST) -n 2 --dist loadfile

.PHONY: test-slow
test-slow: $(STAMP) ## the slow tests too (crash loops, long runs)
	$(PYTEST) -n 2 --dist loadfile -m 'not gpu and not network and not browser'

.PHONY: test-guards
test-guards: $(STAMP) ## break forty drawn lines one by one: do tests see it (40 minutes)
	$(BIN)/python tests/helpers/guarded_lines.py $(VENV)/guarded.json

.PHONY: test-gpu
test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

# each package that pyproject.toml names at the least version that it states, all others as new as these allow
LOWEST := $(VENV)-lowest
LOWEST_STAMP := $(LOWEST)/.installed-$(shell cat pyproject.toml | sha256sum | cut -c1-16)

$(LOWEST_STAMP):
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/python tests/helpers/lowest.py bounds > $(LOWEST)/bounds.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
		--constraint $(LOWEST)/bounds.txt -e '.[dev,search,gguf,loggers,docs]' setuptools
	@rm -f $(LOWEST)/.installed-*
	@touch $@

.PHONY: test-lowest
test-lowest: $(LOWEST_STAMP) ## the tests on the lowest versions that pyproject.toml states (by uv); records them
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile \
		--deselect tests/core/test_release.py::test_lower_bounds_are_those_with_which_the_tests_passed
	$(LOWEST)/bin/python tests/helpers/lowest.py installed > tests/fixtures/lowest.txt

AXE := $(VENV)/browser/node_modules/axe-core/axe.min.js

.PHONY: test-browser
test-browser: $(STAMP) ## the report's page and the site in Chromium (skipped where Chromium, npm or a built site is missing)
	@test -f $(AXE) || npm install --silent --no-audit --no-fund --prefix $(VENV)/browser axe-core@4 || true
	FUSIONLAB_AXE=$(abspath $(AXE)) $(PYTEST) -m browser -rs tests/core/test_report_browser.py tests/core/test_site_browser.py

.PHONY: check
check: $(STAMP) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

DOCS_STAMP := $(VENV)/.docs-$(shell cat pyproject.toml | sha256sum | cut -c1-16)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

.PHONY: docs
docs: $(DOCS_STAMP) ## the documentation site, in docs/_build; a warning or a broken link fails
	PYTHONPATH=$(CURDIR) HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build
	$(BIN)/python docs/check.py docs/_build

.PHONY: tutorials
tutorials: $(STAMP) ## the documentation's tutorials in full (minutes)
	PYTHONPATH=$(CURDIR) HF_HUB_OFFLINE=1 $(BIN)/python tests/helpers/tutorials.py docs/tutorials/*.md

.PHONY: structure
structure: $(STAMP) ## the rooms of the package, what each imports, circles
	$(BIN)/python tests/helpers/structure.py

.PHONY: bench
bench: $(STAMP) ## the benchmarks that need nothing else; each prints one JSON record
	@for bench in $(filter-out %_agreement.py %_commits.py,$(wildcard benchmarks/bench_*.py)); do echo "# $$bench"; $(BIN)/python $$bench || exit 1; done
