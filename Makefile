# anybit: `make run` shows it, `make test` proves it. Both create .venv first and reuse it afterwards.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= What is the capital of France?
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt tools/setup_env.py $(wildcard src/anybit/kernels/native/*.[ch])

.DEFAULT_GOAL := help
.PHONY: help run test check format docs bench gate clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.installed ## a real quantized model answers a question on this machine
	@$(BIN)/anybit run smollm2 "$(PROMPT)"

test: $(VENV)/.installed-dev ## the test suite
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev ## ruff, mypy --strict, import-linter, generated docs current
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/make_docs.py --check

format: $(VENV)/.installed-dev ## sort imports and mend what ruff can mend
	$(BIN)/ruff check --fix src tests tools benchmarks

docs: $(VENV)/.installed-dev ## write the generated parts of README and docs
	$(BIN)/python tools/make_docs.py

gate: $(VENV)/.installed-dev ## compile every GPU kernel for every architecture that it claims; write the record
	$(BIN)/python tools/gate.py

bench: $(VENV)/.installed ## speed on this machine, against llama.cpp where llama-cpp-python is installed
	$(BIN)/python benchmarks/cpu_model.py

clean: ## remove the environment and build products
	rm -rf $(VENV) build dist

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

$(VENV)/.installed-dev: $(SOURCES)
	@$(PYTHON) tools/setup_env.py $(VENV) dev
	@touch $@ $(VENV)/.installed
