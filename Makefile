# Everything a fresh machine needs: Python 3.11+ and make. `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO ?= demo
# ablation and net_search, which take hours on real images, are run by hand.
BENCHMARKS := startup encode_ratio requantize epoch_ratio time_to_accuracy loader_peers disk_peers scale driver_cost simulate_scale

# What computes on --device auto, which is CUDA where there is a card.
GPU_TESTS := tests/latenttrain $(patsubst %,tests/latentprep/%,test_device.py codecs derived encoding pictures quantizing audit/test_verify.py)

.PHONY: demo test lint docs bench bench-gpu chaos image clean help

help:
	@echo "make demo   encode the built-in shapes with the block DCT, train on the codes, print the table"
	@echo "make test   run the tests"
	@echo "make lint   ruff, mypy and import-linter"
	@echo "make docs   write docs/cli.md and docs/architecture.svg from the code"
	@echo "make bench  run the benchmarks under benchmarks/; make bench-gpu what is to be measured and tested on a GPU"
	@echo "make image  build the Docker image for CPUs with docker or podman, and check it"
	@echo "make chaos  kill, cut off, fill up and rob an encode hundreds of times: nothing may be lost"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (torch among others: about a minute)"
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/run.stamp

demo: $(VENV)/run.stamp
	$(BIN)/latentprep encode shapes --codec scatter --bits 4 --out $(DEMO)/shards
	$(BIN)/latentprep info $(DEMO)/shards
	$(BIN)/latenttrain fit $(DEMO)/shards --epochs 10 --out $(DEMO)/run --overwrite

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/cli.py
	$(BIN)/python docs/architecture.py

bench: $(VENV)/dev.stamp
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python benchmarks/$$script.py || exit 1; done

bench-gpu: $(VENV)/dev.stamp
	$(BIN)/python -u benchmarks/gpu.py
	-timeout 240 $(BIN)/python -m pytest tests/test_accelerator.py
	OMP_NUM_THREADS=1 timeout 480 $(BIN)/python -m pytest -n 4 $(GPU_TESTS)

chaos: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/chaos.py

image:
	tests/docker/build.sh

clean:
	rm -rf $(VENV) $(DEMO) build dist
