# make demo    set up .venv, then measure, plan, export, verify, evaluate and report the embedded model
# make test    set up .venv, then lint, check types and run all tests
# make bench   the benchmarks of benchmarks/README.md (minutes to hours; nothing in CI)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check docs bench clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/bitladder run recipes/demo.yaml

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

docs: $(VENV)/.installed
	$(BIN)/python scripts/cli_reference.py > docs/cli.md

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/ladder.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
