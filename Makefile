PYTHON ?= python3
VENV := .venv/bin
MODEL ?=
VIDEO ?=
RETENTION ?= 0.10
USERS ?= 2
DURATION ?= 60

NO_SKIPS ?=
PYTEST = $(VENV)/python -m pytest $(NO_SKIPS)
SIDE_BY_SIDE = -n 2 --dist loadgroup --no-loadscope-reorder

# Where .ci/install puts a program that Debian lacks.
export PATH := $(CURDIR)/.cache/tools:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install install-test demo train loadtest test test-fast test-slow test-runner-v1 test-next-vllm test-gateway check lint ci format

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

test: test-fast  ## all tests, with real engines on the model runner that vLLM has for GPUs
	@$(PYTEST) tests/e2e -m "not slow" $(SIDE_BY_SIDE)

test-fast: install-test  ## the tests that need no engine
	@$(PYTEST) tests -n 2 -m "not engine and not slow"

test-slow: install-test  ## the tests that take long: load test, compiled kernels, damaged files by the thousand
	@$(PYTEST) tests -m slow $(SIDE_BY_SIDE)

test-runner-v1: install-test  ## the tests with real engines again, on vLLM's other model runner
	@$(PYTEST) tests/e2e --runner v1 $(SIDE_BY_SIDE)

test-next-vllm: install-test  ## the tests with real engines on the Python of vLLM's next release, where there is no GPU
	@$(PYTHON) demo/next_vllm.py
	@.venv-next/bin/python -m pytest $(NO_SKIPS) tests/e2e tests/deploy/test_engine_flags.py -m "not slow" $(SIDE_BY_SIDE)

test-gateway:  ## the gateway's tests, in an environment of their own without vLLM
	@$(PYTHON) demo/environment.py --gateway-tests
	@.venv-gateway/bin/python -m pytest $(NO_SKIPS) tests/server -n 2 -m "not slow"

check: lint test-fast  ## format, lint, types, import contracts, the tests that need no engine

lint: install-test
	$(VENV)/ruff format --check
	$(VENV)/ruff check
	$(VENV)/mypy
	$(VENV)/lint-imports

ci:  ## what continuous integration runs: all checks and tests, none skipped; installs what is missing, as root on Debian
	@.ci/install
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test NO_SKIPS=--no-skips
	@$(MAKE) --no-print-directory test-slow NO_SKIPS=--no-skips
	@$(MAKE) --no-print-directory test-runner-v1 NO_SKIPS=--no-skips
	@$(MAKE) --no-print-directory test-next-vllm NO_SKIPS=--no-skips

format: install-test  ## bring the code into shape
	$(VENV)/ruff format
	$(VENV)/ruff check --fix
