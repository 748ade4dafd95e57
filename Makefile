# make demo: set everything up and run the whole chain on the data in data/
# make test: set everything up and pass the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM ?= false
export OMP_WAIT_POLICY ?= PASSIVE

# Two processes where there is no GPU: small models gain more from them than from threads.
LAUNCH ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU || echo --config_file accelerate_configs/cpu_2.yaml)

.PHONY: demo test test-all test-gpu check canary clean

demo: $(VENV)/.ready
	$(BIN)/accelerate launch $(LAUNCH) -m pipelines recipes/demo.yaml
	$(BIN)/python data/bay/judge.py runs/demo

# Half of a test's time is waiting (launches, imports): two side by side, those of one file one after the other.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest -q

# Ten minutes on a real card; writes gpu.json
test-gpu: $(VENV)/.ready
	$(BIN)/python benchmarks/gpu.py

check: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# The suite against the newest versions of the stack, in an environment of its own; lists what breaks.
canary: $(VENV)/.ready
	$(BIN)/python .ci/canary.py

clean:
	rm -rf $(VENV) .canary
