# The environment lives in .venv and follows setup.cfg and constraints.txt; every other target builds it first.
# `make PYTHON=python3.12` chooses the interpreter it is made with.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help install lint test test-cpus check demo faults notebooks slurm-test miniature-gates miniature-worlds

PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
BIN := .venv/bin
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
# pip shows its own progress on a terminal; a log gets one line a stage and the errors.
PIP := $(BIN)/python -m pip --disable-pip-version-check install $$([ -t 1 ] || echo -q)

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile

.venv/.installed: setup.cfg constraints.txt
	@if ! $(BIN)/python $(NEW_ENOUGH) 2>/dev/null; then
	  for python in $(PYTHON) none; do
	    if [ $$python = none ]; then
	      echo "lightning_em needs Python 3.11 or newer, found none among: $(PYTHON); name one: make PYTHON=..." >&2
	      exit 1
	    fi
	    if $$python $(NEW_ENOUGH) 2>/dev/null; then break; fi
	  done
	  echo "[1/3] environment: .venv ($$($$python --version))"
	  $$python -m venv --clear .venv
	fi
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	torch=$$(grep '^torch==' constraints.txt)
	echo "[2/3] $$torch (the largest download)"
	$(PIP) $$torch # first and by itself: a machine that offers a CPU build takes it
	echo "[3/3] lightning_em and its other dependencies (about a minute)"
	$(PIP) -c constraints.txt -e ".[dev,figures,gguf,notebooks]"
	touch $@

install: .venv/.installed ## make .venv and install the pinned dependencies

lint: install ## style, types, import floors, spelling
	@set -x
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/typos

test: install ## the test suite on two processes
	@$(BIN)/python -m pytest -n 2 --dist worksteal

test-cpus: install ## the test suite once with each set of CPU kernels that this machine has
	@failed=
	for setting in native ATEN_CPU_CAPABILITY=default "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"; do
	  # where there is no AVX-512, avx2 is native
	  if [[ $$setting == *avx2* ]] && ! grep -qw avx512f /proc/cpuinfo; then continue; fi
	  echo "== CPU kernels: $$setting"
	  SECONDS=0
	  env $${setting/native/} $(BIN)/python -m pytest -n 2 --dist worksteal || failed+=" ($$setting)"
	  echo "== CPU kernels: $$setting took $$((SECONDS / 60)) min $$((SECONDS % 60)) s"
	done
	if [ "$$failed" ]; then echo "failed with CPU kernels:$$failed" >&2; exit 1; fi

faults: install ## kill, fill, corrupt: every fault test, with a table (minutes)
	@FAULT_TABLE=$${FAULT_TABLE:-fault_table.md} $(BIN)/python -m pytest -p tests.faults.table -m fault -q

SLURM := slurm-wlm munge slurm-wlm-basic-plugins
slurm-test: install ## a real Slurm on this machine (Debian, as root): requeue, sweep, a run in use
	@if ! { command -v sbatch && command -v munged && command -v slurmctld && command -v slurmd; } >/dev/null; then
	  echo "installing $(SLURM)"
	  apt-get update -qq
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(SLURM) >/dev/null
	fi
	$(BIN)/python -m pytest -m slurm tests/slurm

check: lint test ## lint, then test

notebooks: install ## execute notebooks/*.py on the runs under runs/ into the .ipynb beside them
	@$(BIN)/python notebooks/execute.py

demo: install ## a general, a narrow and a reverted solution of a small real chat model, compared
	@$(BIN)/lightning-em demo

GATES := --adapters rank32 # further options: --built trains the worlds on this machine (hours)
miniature-gates: install ## bad-answer rates of ten miniature worlds under two sets of CPU kernels, held to their gates
	@status=0
	for kernels in native default; do
	  if [ $$kernels = default ]; then export ATEN_CPU_CAPABILITY=default LIGHTNING_EM_CACHE=$$PWD/runs/cache-default; fi
	  echo "CPU kernels: $$kernels"
	  $(BIN)/lightning-em miniature table $(GATES) --root runs/gates-$$kernels --markdown runs/gates-$$kernels.md || status=1
	done
	exit $$status

miniature-worlds: install ## train the worlds that the package ships again, after a change of the recipe (hours)
	@for seed in 0 1 2 3 4 5 6 7 8 9; do
	  for world in "" --control; do
	    $(BIN)/lightning-em miniature build --seed $$seed $$world --ship lightning_em/miniature/shipped
	  done
	done
