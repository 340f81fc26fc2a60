# SPDX-License-Identifier: Apache-2.0
# Each target builds .venv by itself; a Python 3.11 and make are all it takes.
SHELL := /bin/bash
RUN := .venv/bin/python
.DEFAULT_GOAL := help
# Tests start many interpreters: what each imports is compiled once, also where the
# installer, or a variable in the environment, would leave that to every single one.
export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv/.pycache
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help venv demo demo-fleet test check format coverage faults bench bench-peers \
	bench-growth bench-plot clean

help: ## Tell what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: .venv/.stamp ## Build the virtual environment

.venv/.stamp: pyproject.toml
	@.ci/venv .venv

.venv-%/.stamp: pyproject.toml
	@.ci/venv .venv-$* $*

demo: venv ## Show fasten at work, in a minute
	@$(RUN) examples/demo.py

demo-fleet: venv ## Show one request cross five processes over one Postgres
	@$(RUN) examples/demo_fleet.py

test: venv ## Run the tests on each Python there is (ARGS="tests/test_rows.py -x")
	@.ci/test $(ARGS)

check: venv ## Lint, format, types, docstrings, spelling
	@.ci/check

format: venv ## Put the sources in shape
	@$(RUN) -m ruff check --fix --exit-zero --quiet .
	@$(RUN) -m ruff format --quiet .

coverage: venv ## Run the tests on one Python and report what they miss
	@rm -f .coverage .coverage.*
	@$(RUN) -m coverage run -m pytest $(ARGS)
	@$(RUN) -m coverage combine --quiet
	@$(RUN) -m coverage report

faults: venv ## Try to break each promise, the long way
	@$(RUN) -m tests.faults $(ARGS)

bench: venv ## Measure against the targets of the README
	@$(RUN) -m benchmarks $(ARGS)

bench-peers: .venv-peers/.stamp ## Measure beside other audit libraries
	@.venv-peers/bin/python -m benchmarks.peers

.venv-peers/.stamp: pyproject.toml
	@.ci/peers .venv-peers

bench-growth: venv ## Measure at 10 k, 100 k and 1 M rows (an hour)
	@$(RUN) -m benchmarks.growth $(ARGS)

bench-plot: venv ## Draw what the three measured last
	@$(RUN) -m benchmarks.plot

clean: ## Remove what was built
	rm -rf .venv .venv-* dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
