# Each target does the set-up that it needs (tools/set-up); when that stands already, it starts at once.
SHELL := bash
# Processes that run tests side by side, because most tests wait more than they compute. Two of them run the tests with real
# engines (tests/conftest.py). 0: one process, which shows what tests print.
JOBS := 6
BIN := .venv/bin
# Many images set it; each engine would then compile all of vLLM's modules again at its start, 25 seconds.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help set-up demo test test-unit test-deep test-integrations matrix test-models lint bench clean
.DEFAULT_GOAL := help

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

set-up: ## Make .venv: vLLM for CPU, the tools, this package (minutes, once)
	@tools/set-up

# exec: a signal for make reaches the demo itself, which ends what it started.
demo: set-up ## Train a model while a head and a headless engine generate (ARGS=--moe: a MoE model)
	@exec $(BIN)/areal-vllm demo $(ARGS)

test: set-up ## Run all tests, some on real vLLM engines (ARGS="-k pause": some of them)
	@exec $(BIN)/pytest -q -n $(JOBS) $(ARGS)

test-unit: set-up ## Run the tests that start no vLLM: a first answer in about 2 minutes
	@exec $(BIN)/pytest -q -n $(JOBS) tests/unit $(ARGS)

test-deep: set-up ## Run the tests with many more hypothesis examples
	@HYPOTHESIS_PROFILE=nightly exec $(BIN)/pytest -q -n $(JOBS) --timeout 7200 $(ARGS)

test-integrations: set-up ## Run the tests with other packages (trainers, AReaL), in .venv-integrations on top of .venv
	@tools/set-up-integrations
	@exec .venv-integrations/bin/python -m pytest -q $(ARGS) tests/with_packages tests/unit/test_zero3.py

matrix: set-up ## Test each vLLM that trainers pin, in an environment of its own (ARGS: versions; 3 to 9 GB at a time)
	@exec $(BIN)/python tools/matrix $(ARGS)

test-models: set-up ## Try updates on every family of models that vLLM serves, half an hour (ARGS: names of some)
	@exec $(BIN)/python -m benchmarks.models $(ARGS)

lint: set-up ## Check style (ruff), types (mypy), the layers of imports, file lengths, commit subjects
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_tree.py

bench: set-up ## Measure on this machine, an hour (ARGS: names of some; see benchmarks/)
	@exec $(BIN)/python -m benchmarks $(ARGS)

clean: ## Remove all that the targets made, .venv too
	flock .venv.lock rm -rf .venv .venv-integrations .matrix
	rm -rf build dist *.egg-info tools/*/build tools/*/*.egg-info .*_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
