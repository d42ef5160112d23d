# FlashCore's menu. `make` alone prints it.
#
# A fresh machine needs Python 3.11+ and nothing else: the targets make .venv and install what this machine can use.
# PYTHON=python3 skips .venv and uses an interpreter that has the packages already.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# What to do is said on the command line alone: a shell that exports a common name such as OUT or RUN for something else
# changes nothing here. Which Python does it (PYTHON, BASE_PYTHON) may stand in front of the command too.
given = $(if $(filter command,$(origin $(1))),$($(1)),$(2))

# The set that fits the driver: CUDA 13, CUDA 12, or no GPU. SET=compile (or gpu, gpu-cuda13) overrides it.
CUDA_MAJOR := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9][0-9]*\)\..*/\1/p' | head -n 1)
ifeq ($(CUDA_MAJOR),)
override SET := $(call given,SET,compile)
else ifeq ($(CUDA_MAJOR),12)
override SET := $(call given,SET,gpu)
else
override SET := $(call given,SET,gpu-cuda13)
endif

# Exact versions: one file for CUDA 12, one for CUDA 13, which also serves machines without a GPU.
CONSTRAINTS := constraints/$(if $(filter gpu,$(SET)),cuda12,cuda13).txt

ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
VENV := $(ROOT)/.venv
BASE_PYTHON ?= python3
override PROFILE := $(call given,PROFILE)
override BACKEND := $(call given,BACKEND)
override KERNEL := $(call given,KERNEL)
override PROBLEM := $(call given,PROBLEM)
override OUT := $(call given,OUT)
override RUN := $(call given,RUN,latest)
override PYTEST_ARGS := $(call given,PYTEST_ARGS)
override LAB_ARGS := $(call given,LAB_ARGS)

ifdef PYTHON
# The package need not be installed for this interpreter; what PYTHONPATH already holds stays.
export PYTHONPATH := $(ROOT)$(if $(PYTHONPATH),:$(PYTHONPATH))
RUN_STAMP :=
DEV_STAMP :=
else
PYTHON := $(VENV)/bin/python
export PATH := $(VENV)/bin:$(PATH)
RUN_STAMP := $(VENV)/.installed-$(SET)
DEV_STAMP := $(VENV)/.installed-$(SET)-dev
endif

FLASHCORE := $(PYTHON) -m flashcore
INSTALL = $(VENV)/bin/python -m pip install --progress-bar on --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: help
help: ## Print this menu
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'
	@echo
	@echo "  Variables: PYTHON=python3 (use that interpreter, no .venv)   PROFILE=quick|full   OUT=folder"
	@echo "             BACKEND=wmma,sdpa-cudnn   PROBLEM='B=1,H=8,S=512,D=64'   RUN=run folder   PYTEST_ARGS='-k records'"

$(VENV)/bin/python:
	@echo "Making .venv with $$($(BASE_PYTHON) --version) ..."
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "FlashCore needs Python 3.11 or newer; name one with BASE_PYTHON=python3.12." >&2; exit 2; }
	@$(BASE_PYTHON) -m venv "$(VENV)"

$(VENV)/.installed-$(SET): pyproject.toml $(CONSTRAINTS) constraints/common.txt | $(VENV)/bin/python
	@echo "Installing FlashCore with the set '$(SET)' (several minutes on a first run) ..."
	@$(INSTALL) -e ".[$(SET)]"
	@touch $@

$(VENV)/.installed-$(SET)-dev: pyproject.toml $(CONSTRAINTS) constraints/common.txt | $(VENV)/bin/python
	@echo "Installing FlashCore with the sets '$(SET)' and 'dev' (several minutes on a first run) ..."
	@$(INSTALL) -e ".[$(SET),dev]"
	@touch $(VENV)/.installed-$(SET) $@

.PHONY: install
install: $(DEV_STAMP) ## Make .venv with everything for development

.PHONY: report
report: $(RUN_STAMP) ## Measure, judge, render: ends with the verdict and where the report lies
	@$(FLASHCORE) report $(if $(PROFILE),--profile $(PROFILE)) $(if $(BACKEND),--backend '$(BACKEND)') \
		$(if $(PROBLEM),--problem '$(PROBLEM)') $(if $(OUT),--out '$(OUT)')

# Three workers, of which one takes over what another has not begun: on two cores, since many tests wait for a process to start
# or to end. More by PYTEST_ARGS='-n 8'.
WORKERS = $$($(PYTHON) -c 'from importlib.util import find_spec as f; print("-n 3 --dist worksteal" if f("xdist") else "")')

.PHONY: test
test: $(DEV_STAMP) ## Run the tests; those that need a GPU are skipped where there is none
	@$(PYTHON) -m pytest $(WORKERS) $(PYTEST_ARGS)

.PHONY: test-fast
test-fast: $(DEV_STAMP) ## Run the tests that start no compiler, browser or notebook: what to run while typing
	@$(PYTHON) -m pytest $(subst -n 3,-n 2,$(WORKERS)) -m 'not (compiler or browser or notebook or slow or gpu)' $(PYTEST_ARGS)

.PHONY: test-all
test-all: $(DEV_STAMP) ## Run the tests and the complete form of those that are sampled
	@$(PYTHON) -m pytest $(WORKERS) --exhaustive $(PYTEST_ARGS)

.PHONY: lab
lab: $(DEV_STAMP) ## Open copies of the notebooks in JupyterLab (LAB_ARGS go to it)
	@$(FLASHCORE) lab $(LAB_ARGS)

.PHONY: build
build: $(RUN_STAMP) ## Compile every kernel, or KERNEL=mine; print registers, spills, Tensor Core instructions
	@$(FLASHCORE) build $(if $(KERNEL),--kernel '$(KERNEL)')

.PHONY: doctor
doctor: $(RUN_STAMP) ## Say what works on this machine, what is missing, and what mends it
	@$(FLASHCORE) doctor

.PHONY: render
render: $(RUN_STAMP) ## Make the page of RUN again from its records
	@$(FLASHCORE) render '$(RUN)' $(if $(OUT),--out '$(OUT)')

.PHONY: verdict
verdict: $(RUN_STAMP) ## Print the verdict of RUN (exit code 0 GO, 3 NO-GO, 4 INCONCLUSIVE)
	@$(FLASHCORE) verdict '$(RUN)' $(if $(OUT),--out '$(OUT)')

.PHONY: lint
lint: $(DEV_STAMP) ## Check style, and that no notebook holds outputs
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m nbstripout --keep-id --verify notebooks/*.ipynb

.PHONY: format
format: $(DEV_STAMP) ## Mend style, and strip the notebooks
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m nbstripout --keep-id notebooks/*.ipynb

.PHONY: wheel
wheel: $(DEV_STAMP) ## Build the wheel into dist/
	@$(PYTHON) -m build --wheel

.PHONY: clean
clean: ## Remove .venv, caches, build outputs and the runs made here (recorded runs stay)
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis reports/runs
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
