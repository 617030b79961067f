# The developer interface. `make test` is what CI runs; see CONTRIBUTING.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install check test bench demo figures gpu clean

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

figures: .venv/ready
	$(BIN)/ridgeplan roofline flash_attention_2 matmul rmsnorm mamba_scan --device h100-sxm \
	  -p batch=1 -p seq=8k -p heads=32 -p flash_attention_2.dim=128 -p causal=true \
	  -p m=2k -p n=2k -p k=2k -p rows=8k -p cols=8k -p channels=5k --out docs/roofline.png

# Every bar that needs a GPU; wants torch, triton and numpy in PYTHON, no installation.
OUT ?= out/gpu-bars
gpu:
	$(PYTHON) -m validate.gpu_bars --out $(OUT)

clean:
	rm -rf .venv .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
