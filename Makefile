# `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV   ?= .venv
MNIST  ?= data/mnist
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow lint runtimes bench reports clean

demo: $(VENV)/.demo
	$(BIN)/compressor demo
	$(BIN)/compressor run model.pt --prune 0.5 --quantize int8

test: $(VENV)/.test
	$(BIN)/python -m pytest

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What else a model may run in: these tests are skipped where it is not installed.
runtimes: $(VENV)/.test
	$(PIP) -e '.[test,openvino]'
	$(BIN)/python -m pytest tests/test_measure_runtime.py tests/test_measure_placement.py tests/pipeline/test_runtimes.py

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark-json=build/benchmarks.json

# The committed reports, their index and the table in the README; MNIST=DIR holds the IDX files.
reports: $(VENV)/.demo
	mkdir -p build
	$(BIN)/compressor demo --out build/digits-cnn.pt --fresh
	$(BIN)/compressor run build/digits-cnn.pt --prune 0.5 --quantize int8 --bench-time normal --out reports/digits-cnn --fresh
	$(BIN)/compressor demo --model cnn --data mnist:$(MNIST) --epochs 2 --out build/mnist-cnn.pt --fresh
	$(BIN)/compressor run build/mnist-cnn.pt --prune 0.5 --quantize int8 --bench-time normal --out reports/mnist-cnn --fresh
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
