# Each target sets up all it needs: a virtual environment in .venv with the pinned packages.
PYTHON ?= python3.11
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help install demo test test-runs test-parts test-interpreted test-monitoring tools lint long bench bench-data bench-layouts bench-planner bench-checkpoint chaos gpu clean

help:
	@echo "make demo      train a small image+text model, stop, resume on another layout, evaluate (ARGS=--json)"
	@echo "make test      the linter and every test, about thirteen minutes on two cores"
	@echo "make test-monitoring  alerts under promtool, a live run under Prometheus and Alertmanager, about three minutes"
	@echo "make long      the longer easy-vqa run, about 40 minutes on two cores"
	@echo "make bench     a rank beside plain PyTorch, the launcher beside torchrun, about fifteen minutes"
	@echo "make bench-data  the data pipeline beside its peers, about twenty-five minutes"
	@echo "make bench-layouts  every layout beside a plain PyTorch model, about eight minutes"
	@echo "make bench-planner  the planner beside published runs, where their tables are at hand"
	@echo "make bench-checkpoint  saving and loading beside plain files, safetensors and DCP, about a minute"
	@echo "make chaos     saves killed at every operation, ranks and nodes of a cluster killed, a network cut, about an hour"
	@echo "make gpu       the kernels beside their peers, on a machine with a GPU"
	@echo "make lint      ruff"
	@echo "make clean     remove the virtual environment and what builds and tests left"

install: $(READY)

# PyTorch first and pinned, or another package draws in a build with gigabytes of CUDA. DeepSpeed's own set-up
# imports PyTorch, which an isolated build would not see.
$(READY): constraints.txt pyproject.toml setup.py $(wildcard data_pipeline/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy setuptools wheel packaging ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python examples/demo.py $(ARGS)

# Whole runs wait more than they compute, and leave a processor to the rest; each of both gets about half of the time.
test: $(READY) lint
	@PYTHONUNBUFFERED=1 $(MAKE) --no-print-directory --jobs=2 --output-sync=line test-runs test-interpreted test-parts

RUNS := $(wildcard tests/launcher/test_[d-z]*.py)
test-runs: $(READY)
	$(BIN)/python -m pytest $(RUNS) $(ARGS)

test-parts: $(READY)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(RUNS) tests/monitoring) $(ARGS)

# Triton decides when it is imported whether kernels are interpreted: these tests have a process of their own.
test-interpreted: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/interpreted tests/model/test_multimodal.py -k "interpreted or equals"

test-monitoring: $(READY) tools
	$(BIN)/python -m pytest tests/monitoring $(ARGS)

# Prometheus' own programs and a browser, of Debian's packages; on other systems, or without root, install them beforehand.
TOOLS := promtool prometheus prometheus-alertmanager chromium
tools:
	@for tool in $(TOOLS); do command -v $$tool >/dev/null || missing=$$tool; done; [ -z "$$missing" ] || \
	  apt-get install --yes --no-install-recommends prometheus prometheus-alertmanager chromium

long: $(READY)
	$(BIN)/armillary train examples/easy_vqa_long.toml $(ARGS)

# The peers want other versions of shared packages than ours: an environment of their own, in which ours run too.
BENCH := .venv-bench
$(BENCH)/.ready: benchmarks/constraints.txt pyproject.toml setup.py $(wildcard data_pipeline/native/*)
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --constraint benchmarks/constraints.txt torch numpy setuptools wheel packaging ninja
	$(BENCH)/bin/python -m pip install --quiet --constraint benchmarks/constraints.txt --no-build-isolation --editable ".[bench]"
	@touch $@

bench: $(READY)
	$(BIN)/python -m benchmarks.speed $(ARGS)

bench-data: $(BENCH)/.ready
	$(BENCH)/bin/python -m benchmarks.data.run $(ARGS)

bench-layouts: $(READY)
	$(BIN)/python -m benchmarks.layouts $(ARGS)

bench-planner: $(READY)
	$(BIN)/python -m benchmarks.planner $(ARGS)

bench-checkpoint: $(READY)
	$(BIN)/python -m benchmarks.checkpoint $(ARGS)

chaos: $(READY)
	$(BIN)/python -m benchmarks.chaos $(ARGS)

# Whatever Python has PyTorch for the GPU: the virtual environment's own is for CPU.
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(BENCH) build *.egg-info data_pipeline/*.so .pytest_cache .ruff_cache .hypothesis
