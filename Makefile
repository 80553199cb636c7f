# make help lists the targets. Stamps in .venv remember what is set up, so repeating costs nothing.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
CONSUL := .cache/consul/consul
STORE := .cache/store-2
SOAK_KILLS ?= 200
NATIVE_SOURCES := $(wildcard $(addprefix kernels/native/,*.py *.[ch] */*.[ch]))
SETUP_INPUTS := pyproject.toml constraints.txt scripts/setup.sh
CHECKED := popmesh router pop_node registry kernels topology wire tests benchmarks

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo test check sanitize soak format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp-dev $(VENV)/.stamp-native ## everything that developing needs, in .venv

demo: $(VENV)/.stamp-gguf $(VENV)/.stamp-native ## a mesh of three sites on this machine; ONCE=1 ends after the sample
	@$(BIN)/popmesh demo --store $(STORE) $(if $(filter-out 0,$(ONCE)),--once)

test: setup $(CONSUL) ## the tests; ARGS=... hands pytest its arguments
	$(if $(ARGS),$(BIN)/pytest $(ARGS),scripts/test.sh)

check: setup ## lint, format, types, and who may import whom
	@$(BIN)/mypy & types=$$!; \
	$(BIN)/ruff check $(CHECKED) && $(BIN)/ruff format --check $(CHECKED) && $(BIN)/lint-imports; others=$$?; \
	wait $$types && exit $$others

sanitize: setup ## tests of the native kernels under the address and undefined-behaviour sanitizers
	@scripts/sanitize.sh $(ARGS)

soak: setup ## hundreds of kills under load, report in build/soak; SOAK_KILLS=N changes how many
	$(BIN)/python -m tests.e2e.soak --kills $(SOAK_KILLS) --report build/soak --store $(STORE)

format: setup ## rewrite the code in the house's format
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean: ## remove everything that make has made
	rm -rf $(VENV) .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f kernels/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-gguf: $(SETUP_INPUTS)
	@PYTHON="$(PYTHON)" scripts/setup.sh gguf
	@touch $@

# What developing needs has all that the demo needs: one run of pip for both.
$(VENV)/.stamp-dev: $(SETUP_INPUTS)
	@PYTHON="$(PYTHON)" scripts/setup.sh dev
	@touch $(VENV)/.stamp-gguf $@

# Without a C compiler that works the mesh runs on the torch operations.
$(VENV)/.stamp-native: $(NATIVE_SOURCES) | $(VENV)/.stamp-gguf
	@$(BIN)/python -m kernels.native.build || echo "setup: the native kernels are left out"
	@touch $@

$(CONSUL):
	@scripts/get_consul.sh $@
