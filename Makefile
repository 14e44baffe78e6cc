# Set up and run everything; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
PAPER_READY := $(VENV)/.paper-ready
ECOSYSTEM_READY := $(VENV)/.ecosystem-ready
# Of `make paper`: what it trains on, and the reduced protocol unless FULL=1.
DATA ?= curves
# A process for each core (tests/conftest.py says how many), each with one thread; idle ones take tests from the others.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: help test test-sweeps test-all test-ecosystem demo paper bench report lint hooks docs gpu clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,demo,study,triton,cpu,lint]"
	@touch $@

$(DOCS_READY): $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

$(PAPER_READY): $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[paper]"
	@touch $@

$(ECOSYSTEM_READY): $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ecosystem]"
	@touch $@

test: $(READY)  ## the tests of everything, a few minutes on two cores
	$(PYTEST)

test-sweeps: $(READY)  ## the long sweeps alone: more sizes, rules, trajectories and orders of the same, all kernels for sm_90
	$(PYTEST) -m sweep

test-all: test test-sweeps  ## the whole test suite that this machine can run

test-ecosystem: $(ECOSYSTEM_READY)  ## LocoProp in Lightning, accelerate, the Trainer of transformers and TensorBoard
	$(PYTEST) tests/optimizer/test_engines.py tests/optimizer/test_local_losses.py tests/processes/test_examples.py

demo: $(READY)  ## train the demo's autoencoders; writes demo_out/
	$(RUN) -m locoprop_torch.demo --out demo_out

paper: $(PAPER_READY)  ## the paper's experiments, reduced (or FULL=1; DATA="mnist.npz fashion-mnist"); goes on where it stopped
	$(RUN) -m bench.autoencoder $(if $(FULL),,--quick) --data $(DATA) --resume $(ARGS)

bench: $(READY)  ## the microbenchmarks; writes bench_out/
	$(RUN) -m bench --out bench_out

report: $(READY)  ## compile every kernel for six GPU targets (or TARGETS="sm_90 ..."; BRIEF=1 leaves out the most alike)
	$(RUN) -m locoprop_kernels.compile_report $(if $(TARGETS),--target $(TARGETS)) $(if $(BRIEF),--brief)

lint: $(READY)  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

hooks: $(READY)  ## let git run the linters before each commit, with pre-commit
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[hooks]"
	$(RUN) -m pre_commit install

docs: $(DOCS_READY)  ## build the guide; writes site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

gpu:  ## tests, rates, predictions beside measurements on this GPU, in eight minutes; $(PYTHON) as it is, installs nothing
	PYTHONPATH=.:python $(PYTHON) -m bench.gpu $(ARGS)

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info demo_out bench_out site .pytest_cache .mypy_cache .ruff_cache
