PYTHON ?= python3
VENV := .venv/bin
MODEL ?=
VIDEO ?=
RETENTION ?= 0.10
USERS ?= 2
DURATION ?= 60

.DEFAULT_GOAL := help
.PHONY: help install install-test demo train loadtest test test-fast check format

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## vLLM, the plugin and the gateway, into .venv
	@$(PYTHON) demo/environment.py

install-test:
	@$(PYTHON) demo/environment.py --with test

demo: install  ## ask a real engine about a real video, whole and reduced; MODEL=… VIDEO=… RETENTION=…
	@$(VENV)/python -m demo.run $(if $(MODEL),--model "$(MODEL)") $(if $(VIDEO),--video "$(VIDEO)") --retention "$(RETENTION)"

train: install  ## train the embedded model from nothing (hours on a CPU); goes on where it was stopped
	@$(VENV)/python -m demo.train .cache/train

loadtest:  ## users who ask a real engine about videos, whole and then reduced; USERS=… DURATION=… MODEL=… RETENTION=…
	@$(PYTHON) demo/environment.py --with loadtest
	@$(VENV)/python loadtest/run.py $(if $(MODEL),--model "$(MODEL)") --retention "$(RETENTION)" --users "$(USERS)" --seconds "$(DURATION)"

test: test-fast  ## all tests, with real engines on both of vLLM's model runners
	@echo "Real engines, on both model runners side by side; the second one's tests are shown when they are done."
	@mkdir -p .cache; $(VENV)/python -m pytest tests/e2e --runner v2 > .cache/test-v2.log 2>&1 & second=$$!; \
	trap 'kill $$second' INT TERM; \
	$(VENV)/python -m pytest tests/e2e --runner v1; first_status=$$?; \
	wait $$second; second_status=$$?; echo "On the second runner:"; cat .cache/test-v2.log; \
	[ $$first_status -eq 0 ] && [ $$second_status -eq 0 ]

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
