# Everything runs in .venv, which these targets make: nothing but Python >= 3.11 and make is needed.
#   make speedrun   corpus, tokenizer, pretraining, evaluation and a report, in minutes on a CPU
#   make scaling    ladders of small models, scaling laws fitted to them, and a report
#   make emergence  grokking, addition, induction heads, sparse parity, few-shot: and a report
#   make test       lint, format and all tests but the longest
#   make test-long  those
#   make test-launch  sweeps on SkyPilot, in an environment of their own: it needs another click
# PYTHON=... picks the interpreter, ARGS=... adds flags, PYTEST_ARGS=... replaces pytest's.

VENV := .venv
BIN := $(VENV)/bin
LAUNCH_VENV := .venv-launch
INSTALL = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check
# Shapes and types in annotations are checked here, never in a run.
CHECK_TYPES := '--jaxtyping-packages=llm,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))'
PYTEST_ARGS ?= -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# By running it: a version manager leaves stand-ins on the PATH for versions it does not have.
USABLE := 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'

.PHONY: help speedrun scaling emergence test test-long test-launch format clean

help:
	@sed -n 's/^\#   //p' Makefile

speedrun: $(VENV)/.installed
	$(BIN)/python -m experiments.speedrun --workdir=runs/speedrun $(ARGS)

scaling: $(VENV)/.installed
	$(BIN)/python -m experiments.scaling --workdir=runs/scaling $(ARGS)

emergence: $(VENV)/.installed
	$(BIN)/python -m experiments.emergence --workdir=runs/emergence $(ARGS)

test: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(CHECK_TYPES) $(PYTEST_ARGS)

test-long: $(VENV)/.test-installed
	$(BIN)/python -m pytest $(CHECK_TYPES) $(PYTEST_ARGS) -m long

test-launch: $(LAUNCH_VENV)/.test-installed
	$(LAUNCH_VENV)/bin/python -m pytest $(CHECK_TYPES) tests/launch

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LAUNCH_VENV)

# Stamps, so that a second call starts at once; a changed declaration installs again.
%/.created:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if "$$python" -c $(USABLE) >/dev/null 2>&1; then \
	    echo "Making $* with $$("$$python" --version)"; \
	    rm -rf $* && "$$python" -m venv $* && touch $@; exit; \
	  fi; \
	done; \
	echo "error: no usable Python >= 3.11 (with venv) found; install one, or: make PYTHON=/path/to/python3" >&2; \
	exit 2

$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py constraints.txt
	@echo "Installing the project (some minutes the first time)"
	$(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.test-installed: $(VENV)/.created pyproject.toml setup.py constraints.txt
	@echo "Installing the project and what its tests need (some minutes the first time)"
	$(INSTALL) -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed

$(LAUNCH_VENV)/.test-installed: $(LAUNCH_VENV)/.created pyproject.toml setup.py constraints-launch.txt
	@echo "Installing the project, SkyPilot and pytest (some minutes the first time)"
	$(INSTALL) -c constraints-launch.txt -e '.[launch]' beartype hypothesis pytest
	@touch $@
