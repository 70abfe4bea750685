# One command per need; `make` alone lists them. Everything is installed into .venv, nothing anywhere else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0
.DEFAULT_GOAL := help
.PHONY: help demo test lint chaos fuzz bench gpu-check clean

help: ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/installed-demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.x")'
	@echo "installing into $(VENV) (about two minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/installed-all: pyproject.toml $(VENV)/installed-demo
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint,bench]'
	@touch $@

demo: $(VENV)/installed-demo ## real photographs through the GPU pipeline; leaves out/contact-sheet.png
	@$(BIN)/python -m examples.photos.demo

# Three processes on two cores, because most tests wait most of the time; each has its own Redis, Ray and RabbitMQ. In
# the order of the folders, for the files with the quickest tests come last: whoever is done first takes them.
TEST_PROCESSES ?= 3
test: $(VENV)/installed-all ## all tests that can run here; says what was skipped and why
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# The same seed is the same schedule of tasks and faults; the summary is written to out/chaos.
SEED ?= 1
MINUTES ?= 1
chaos: $(VENV)/installed-all ## kills and stops at random from SEED=n for MINUTES=m while thousands of tasks run; says whether any was lost
	@$(BIN)/python -u -m tests.chaos.run --seed $(SEED) --minutes $(MINUTES)

SECONDS ?= 60
fuzz: $(VENV)/installed-all ## atheris looks for a message that harms the worker, for SECONDS=n; not part of the tests
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	@$(BIN)/python -m tests.fuzz.messages -max_total_time=$(SECONDS)

lint: $(VENV)/installed-all ## linters, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# BENCH="noop waiting" runs some of them, BENCH="noop --quick" a smoke run.
BENCH ?=
bench: $(VENV)/installed-all ## all benchmarks beside the usual alternatives, or BENCH=noop; JSON and plots in benchmarks/results
	@$(BIN)/python -m benchmarks $(BENCH)

# On a GPU host: `make gpu-check`, or `make gpu-check CUDA=13`; GPU_PYTHON=python3 uses what is installed already.
CUDA ?= 12
GPU_PYTHON ?=
$(VENV)-gpu/installed: pyproject.toml
	@$(PYTHON) -m venv $(VENV)-gpu
	@$(VENV)-gpu/bin/python -m pip install --quiet --disable-pip-version-check -e '.[cuda$(CUDA),test-tools,bench]'
	@touch $@

gpu-check: $(if $(GPU_PYTHON),,$(VENV)-gpu/installed) ## on a GPU host: tests, cold against warm, demo and benchmark; writes a report
	@$(or $(GPU_PYTHON),$(VENV)-gpu/bin/python) -m tests.gpu.check

clean: ## remove what was installed and produced
	@rm -rf $(VENV) $(VENV)-gpu out build *.egg-info .mypy_cache .ruff_cache .pytest_cache
