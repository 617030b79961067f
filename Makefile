# The developer interface. `make test` is what CI runs; see CONTRIBUTING.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install check test bench demo clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

install: .venv/ready

check: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test: .venv/ready
	$(BIN)/python -m tests

bench: .venv/ready
	$(BIN)/python -m benchmarks

demo: .venv/ready
	$(BIN)/ridgeplan plan examples/llama3-8b.json --cluster hgx-h100 --nodes 8 --seq 128k --global-batch 64

clean:
	rm -rf .venv .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
