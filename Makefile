# From a fresh machine to a served model: `make up`. Everything is installed in .venv; a second call does only what is
# missing. `make help` lists the targets.
PORT ?= 8000
NAME ?= default
MODEL ?=
UP ?=
TESTS ?= tests
PYTHON ?=
UPGRADE ?=
IMAGES ?=
E2E ?=
GPU ?=
KV ?=

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
PROTOS := $(wildcard proto/baton_proto/*.proto)
STUBS := proto/baton_proto/worker_pb2.py

.PHONY: help up down install test kernels e2e lint bench bench-kv gpu lock chart images clean
.DEFAULT_GOAL := help

help:
	@echo "make up      install what is missing, start router + prefill + decode, return when they serve"
	@echo "             PORT=$(PORT) NAME=$(NAME) MODEL=folder-or-hub-name UP='more flags of baton up'"
	@echo "make down    stop them (NAME=$(NAME))"
	@echo "make test    the test suite with make kernels (TESTS=tests/cli for one room)"
	@echo "make kernels GPU kernels without a GPU: interpreted against their references, compiled on each supported Triton"
	@echo "make e2e     the story on a real cluster: KUBECONFIG, else the test cluster kit, else kind (E2E='-k operator')"
	@echo "make lint    ruff, mypy, import rings, the torch-free rooms, sizes and settings"
	@echo "make bench   value, ceiling and fraction of each figure on this machine"
	@echo "make bench-kv the same of KV handoff, with NIXL and Mooncake beside it (KV='--only small')"
	@echo "make gpu     on a machine with a GPU: its tests, kernels and engine against their floors (GPU=--dry-run: what it does)"
	@echo "make lock    write constraints.txt anew (UPGRADE=--upgrade for the newest versions)"
	@echo "make chart   write CRDs, dashboards and the chart's copies anew"
	@echo "make images  images for a test cluster, without Docker (users build */Dockerfile)"
	@echo "make clean   remove the virtual environment and all caches"

up: install
	@$(BIN)/baton up $(MODEL) --detach --name $(NAME) --port $(PORT) $(UP)

down:
	@if [ -x $(BIN)/baton ]; then $(BIN)/baton down --name $(NAME); else echo "nothing is installed, nothing runs"; fi

install: $(VENV)/.stamp $(STUBS)

$(BIN)/uv:
	@python=$$(tools/find-python $(PYTHON)) && echo "make: virtual environment with $$python" && \
	"$$python" -m venv $(VENV) && awk '/^[^ ]/ { uv = /^uv==/ } uv' constraints.txt > $(VENV)/uv.txt && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $(VENV)/uv.txt

$(VENV)/.stamp: pyproject.toml constraints.txt | $(BIN)/uv
	@echo "make: installing (the first time about 3 GB, most of it torch)"
	@tools/install $(VENV) '.[dev]'
	@touch $@

# The build hook makes them during installation; this rule is for a .proto that changed since.
$(STUBS): $(PROTOS) proto/build_stubs.py | $(VENV)/.stamp
	@$(BIN)/python proto/build_stubs.py > /dev/null
	@touch $@

test: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not process and not cluster" $(TESTS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m process $(TESTS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster -rs $(TESTS)
	@$(if $(filter tests tests/kernels%,$(TESTS)),$(MAKE) --no-print-directory kernels)

# Two ways that cannot share a process with each other or with the other tests: Triton decides at its import.
kernels: install
	@$(BIN)/python tools/tritons.py
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m interpret tests
	@OMP_NUM_THREADS=1 $(BIN)/python tools/compile_kernels.py

e2e: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -rs --durations=10 e2e $(E2E)

lint: install
	@echo "lint: ruff" && $(BIN)/ruff check .
	@echo "lint: mypy --strict" && $(BIN)/mypy
	@echo "lint: rings of imports" && $(BIN)/lint-imports
	@echo "lint: rooms without torch" && $(BIN)/python tools/no_torch.py baton_router baton_operator baton_fetch baton.main
	@echo "lint: the chart's copies" && $(BIN)/python tools/chart.py --check
	@echo "lint: sizes and settings" && $(BIN)/python tools/report.py

bench: install
	@PYTHONPATH=.:tests $(BIN)/python -m bench $(BENCH)

bench-kv: install
	@PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m bench.kvtransfer $(KV)

gpu: install
	@PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m bench.gpu $(GPU)

chart: install
	@$(BIN)/python -m baton_operator.crd
	@$(BIN)/python tools/chart.py
	@$(BIN)/python tools/dashboards.py
	@$(BIN)/python tools/fields.py

images: install
	@$(BIN)/python tools/make_images.py $(IMAGES)

lock: $(BIN)/uv
	@$(BIN)/python tools/lock.py $(UPGRADE)

clean:
	@rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist $(wildcard proto/baton_proto/*_pb2*)
