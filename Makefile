PYTHON ?= python3
VENV := .venv/bin
MODEL ?=
VIDEO ?=
RETENTION ?= 0.10

.DEFAULT_GOAL := help
.PHONY: help install install-test demo test test-fast test-engine check format

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## vLLM, the plugin and the gateway, into .venv
	@$(PYTHON) demo/environment.py

install-test:
	@$(PYTHON) demo/environment.py --with test

demo: install  ## ask a real engine about a real video, whole and reduced; MODEL=… VIDEO=… RETENTION=…
	@$(VENV)/python demo/run.py $(if $(MODEL),--model "$(MODEL)") $(if $(VIDEO),--video "$(VIDEO)") --retention "$(RETENTION)"

test: install-test  ## all tests, with real engines on both of vLLM's model runners
	@$(VENV)/python -m pytest tests -n 2 -m "not engine"
	@$(VENV)/python -m pytest tests/e2e --runner v1
	@$(VENV)/python -m pytest tests/e2e --runner v2

test-fast: install-test  ## the tests that need no engine
	@$(VENV)/python -m pytest tests -n 2 -m "not engine"

check: install-test  ## format, lint, types, import contracts, tests
	$(VENV)/ruff format --check
	$(VENV)/ruff check
	$(VENV)/mypy
	$(VENV)/lint-imports
	@$(MAKE) --no-print-directory test

format: install-test  ## bring the code into shape
	$(VENV)/ruff format
	$(VENV)/ruff check --fix
