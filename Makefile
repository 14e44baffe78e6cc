# Set up and run everything; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready

.PHONY: help test demo bench report lint docs gpu clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,demo,triton,lint]"
	@touch $@

$(DOCS_READY): $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

test: $(READY)  ## the whole test suite that this machine can run
	$(RUN) -m pytest

demo: $(READY)  ## train the demo's autoencoders; writes demo_out/
	$(RUN) -m locoprop_torch.demo --out demo_out

bench: $(READY)  ## the microbenchmarks; writes bench_out/
	$(RUN) -m bench --out bench_out

report: $(READY)  ## compile every kernel for six GPU targets (or TARGETS="sm_90 ..."): registers, spills, matrix instructions
	$(RUN) -m locoprop_kernels.compile_report $(if $(TARGETS),--target $(TARGETS))

lint: $(READY)  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(DOCS_READY)  ## build the guide; writes site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

gpu:  ## numerics, then timings, on this machine's GPU; uses $(PYTHON) as it is, installs nothing
	PYTHONPATH=.:python $(PYTHON) -m bench.gpu

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info demo_out bench_out site .pytest_cache .mypy_cache .ruff_cache
