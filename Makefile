# The door to the project. `make` alone lists what it can do; everything installs itself first.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

# The interpreter for .venv; empty: the first of python3, the system's own and the newer ones that is at least 3.11 and optimized.
PYTHON ?=
# More arguments for pytest or the benchmark: make test ARGS="tests/wire -x"
ARGS ?=
# Seconds that each fuzzer runs.
FUZZ_SECONDS ?= 60
# Minutes of load, repeats of each drill, seconds of each flood and examples of each operation of the API in a soak (0 leaves one
# out), and what it writes.
SOAK_MINUTES ?= 30
SOAK_DRILLS ?= 5
SOAK_FLOODS ?= 20
SOAK_EXAMPLES ?= 20
SOAK_WRITES ?= --report docs/soak.md --json docs/soak.json

BIN := .venv/bin
# One stamp per set. An environment with the dev set has the server set too, so `demo` accepts either.
SERVER := .venv/.installed-server
DEV := .venv/.installed-dev
SETUP_INPUTS := pyproject.toml tools/setup.sh

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(SERVER) ## A whole platform on this machine, a sample app, a tunnel to it and one request through it
	$(BIN)/portico demo

# What no clock decides runs on both cores at once, a server of its own for each, and a file at a time; everything else alone.
BESIDE := tests/contracts tests/control tests/fuzz tests/kit tests/tools tests/wire

.PHONY: test
test: $(DEV) ## Run every test (ARGS="tests/wire -x" for some)
ifeq ($(strip $(ARGS)),)
	@failed=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(BESIDE) || failed=1; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(BESIDE)) || failed=1; \
	exit $$failed
else
	$(BIN)/python -m pytest $(ARGS)
endif

.PHONY: check
check: $(DEV) ## Format, lint, types, layers, contracts, generated documents
	$(BIN)/python tools/check.py

.PHONY: setup
setup: $(DEV) ## Make .venv with everything for development

.PHONY: format
format: $(DEV) ## Rewrite the code in the project's format and regenerate the generated documents
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/python tools/reference.py --write

.PHONY: docs
docs: $(DEV) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

.PHONY: fuzz
fuzz: $(DEV) ## Run the coverage-guided fuzzers (FUZZ_SECONDS=60 each)
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

.PHONY: bench
bench: $(DEV) ## Measure Portico beside nginx and other tunnels (ARGS="--quick --only small-get" for some)
	$(BIN)/python -m bench $(ARGS)

.PHONY: soak
soak: $(DEV) ## A platform under load with restarts (SOAK_MINUTES=30), every drill (SOAK_DRILLS=5 times), flood and API walk
	$(if $(filter-out 0,$(SOAK_FLOODS)),FLOOD_SECONDS=$(SOAK_FLOODS) $(BIN)/python -m pytest tests/floods -q)
	$(if $(filter-out 0,$(SOAK_EXAMPLES)),API_EXAMPLES=$(SOAK_EXAMPLES) $(BIN)/python -m pytest tests/control/test_schemathesis.py -q)
	$(BIN)/python -m tests.soak.run --minutes $(SOAK_MINUTES) --drills $(SOAK_DRILLS) $(SOAK_WRITES) $(ARGS)

.PHONY: lock
lock: ## Resolve uv.lock anew and export it to requirements/ (needs uv)
	@command -v uv >/dev/null || { echo "portico: make lock needs uv (pip install uv)" >&2; exit 1; }
	uv lock $(ARGS)
	uv export $(EXPORT) --no-dev --group build -o requirements/agent.txt
	uv export $(EXPORT) --no-dev --group build --extra server -o requirements/server.txt
	uv export $(EXPORT) --extra server --group dev -o requirements/dev.txt
EXPORT := --quiet --frozen --no-emit-project --no-annotate --no-header

.PHONY: clean
clean: ## Remove .venv and everything built
	rm -rf .venv site dist build .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(DEV): requirements/dev.txt $(SETUP_INPUTS)
	@tools/setup.sh dev $(PYTHON)
	@touch $(SERVER) $(DEV)

$(SERVER): requirements/server.txt $(SETUP_INPUTS)
	@tools/setup.sh server $(PYTHON)
	@touch $(SERVER)
