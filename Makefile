# `make demo` and `make test` work from a fresh clone: they make .venv on first use, and again when
# what it is made from has changed. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed

# NO_VENV=1 runs straight from the checkout on the packages that PYTHON has, and installs nothing.
ifdef NO_VENV
RUN := PYTHONPATH=.$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(STAMP)
endif

# Test processes. 0 runs the tests in pytest's own process.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
XDIST := $(if $(filter-out 0,$(JOBS)),-n $(JOBS) --dist worksteal)

.DEFAULT_GOAL := help
.PHONY: help demo gallery test lint format verify gpu peers compile-report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  ARGS="..."           more arguments for the command behind a target'
	@echo '  PYTHON=python3.12    the interpreter to start from (default: python3)'
	@echo '  NO_VENV=1            use the packages that PYTHON has; install nothing'
	@echo '  JOBS=N               test processes (default: one a core, at most 8)'
	@echo '  PEERS=folder         of wheels: `make peers` fills it (default: peers), `make gpu` reads it'

# Threads sleep while they wait. Where others use the cores too, spinning ones make a step of
# decoding, which is hundreds of short products, several times as long.
demo: export OMP_WAIT_POLICY ?= passive
demo: $(READY) ## run MiniLM and SmolLM2 with their own attention and with fastattn
	$(RUN) -m fastattn.cli demo $(ARGS)

gallery: export OMP_WAIT_POLICY ?= passive
gallery: $(READY) ## run every example of docs/gallery.md; ARGS="--quick" or "--check"
	$(RUN) -m examples.gallery $(ARGS)

# One thread a test process: two processes with a thread pool each fight over the same cores.
test: export OMP_NUM_THREADS ?= 1
test: $(READY) ## run the tests
	$(RUN) -m pytest -q $(XDIST) $(ARGS)

lint: $(READY) ## check format, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy fastattn

format: $(READY) ## rewrite the sources in the project's format
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

verify: $(READY) ## compare every feature and dtype with float64
	$(RUN) -m fastattn.cli verify $(ARGS)

gpu: ## parity and benchmarks on a CUDA machine, from the checkout, installing nothing; PEERS=folder
	PYTHONPATH=.$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m \
	    $(if $(PEERS),benchmarks.with_peers $(PEERS)) benchmarks.gpu $(ARGS)

peers: ## fetch the peers' wheels into PEERS=folder, for `make gpu` on a machine without a network
	PYTHONPATH=.$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m benchmarks.fetch_peers \
	    $(or $(PEERS),peers) $(ARGS)

compile-report: $(READY) ## compile every kernel config for every target, without a GPU
	$(RUN) -m fastattn.testing.compile_report $(ARGS)

clean: ## remove the virtual environment and what builds and tools left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

$(STAMP): .ci/install setup.py pyproject.toml constraints.txt
	.ci/install $(VENV) $(PYTHON)
	@touch $@
