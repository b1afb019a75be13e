# Every target first creates or updates .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
STAMP := .venv/stamp-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
UNIT_THREADS := OMP_NUM_THREADS=1
# Many tests wait for ranks, Ray or a limit; two processes use that time. PYTEST_PROCESSES=0 runs them in one.
PYTEST := $(UNIT_THREADS) $(BIN)/python -m pytest
PYTEST_PROCESSES ?= 2
PARALLEL := --numprocesses $(PYTEST_PROCESSES) --dist loadgroup --no-loadscope-reorder

.PHONY: bench bench-data chaos check clean demo demo-tiny fixtures format graph help integration test test-isa test-slow unit venv
.DEFAULT_GOAL := help

help:
	@echo "make demo    run the main job on real input; RECIPE=recipes/demo-long.yaml for longer"
	@echo "make demo-tiny  the same path in two minutes on generated scenes, without a download"
	@echo "make test    run all tests"
	@echo "make test-isa  run the model's tests under three instruction sets"
	@echo "make fixtures DIR=...  compare with the numbers of the original code"
	@echo "make check   lint, format, types, import contracts, spelling, style limits"
	@echo "make graph   list which folder imports which, floor by floor"
	@echo "make chaos N=100  run, or resume, N schedules of faults; result in docs/reliability.md"
	@echo "make bench   run all benchmarks"
	@echo "make bench-data  compare the data pipeline with its peers, in an environment made for them"
	@echo "make clean   remove everything that make created"

venv: $(STAMP)

$(STAMP):
	@echo "Installing into .venv: about 3 minutes the first time; 3 GB, or 6.5 GB where pip chooses torch for CUDA"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --constraint constraints.txt --editable '.[dev,demo]'
	$(BIN)/python -m pip check --disable-pip-version-check
	@rm -f .venv/stamp-*
	@touch $@

unit: venv
	$(PYTEST) $(PARALLEL) -m "unit and not slow"

integration: venv
	$(PYTEST) $(PARALLEL) -m "integration or chaos"

test: venv
	$(PYTEST) $(PARALLEL) -m "not slow"

# The model's tests under other CPU instruction sets, and with two threads.
ISA_SETS := ATEN_CPU_CAPABILITY=default,OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2,OMP_NUM_THREADS=1 \
  ONEDNN_MAX_CPU_ISA=SSE41,MKL_ENABLE_INSTRUCTIONS=SSE41,OMP_NUM_THREADS=2
ISA_TESTS := $(addprefix tests/unit/model/test_,losses.py stage1_reference.py stage2.py language.py export.py)

test-isa: venv
	for set in $(ISA_SETS); do echo "$$set"; \
	  env $$(echo "$$set" | tr , ' ') $(BIN)/python -m pytest -q $(ISA_TESTS) || exit 1; done

test-slow: venv
	$(PYTEST) -m slow --timeout 1500

fixtures: venv
	$(UNIT_THREADS) $(BIN)/python -m tests.fixtures_check $(or $(DIR),tests/data)

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tests/style_limits.py

graph: venv
	$(BIN)/python -m tests.import_graph

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: venv
	$(BIN)/python -m isthmus.demo.main $(RECIPE)

demo-tiny: venv
	$(BIN)/python -m isthmus.demo.main recipes/demo-tiny.yaml

chaos: venv
	$(UNIT_THREADS) $(BIN)/python -m tests.chaos.run --schedules $(or $(N),100) --report

bench-data: venv
	$(UNIT_THREADS) $(BIN)/python -m benchmarks.data_throughput

bench: venv
	$(BIN)/python -m benchmarks.run_all

clean:
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
