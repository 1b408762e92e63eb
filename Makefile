PYTHON ?= python3
VENV ?= .venv
ARGS ?=

STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help install demo test bench lint clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=python3.12 chooses the interpreter, VENV=dir the environment, ARGS='...' goes to demo, test and bench"

install: $(STAMP) ## create the virtual environment and install what both requirement files pin

demo: $(STAMP) ## run the whole model on a small example
	$(RUN) demo.py $(ARGS)

# One thread: the models of the tests are so small that threads would mostly wait for one another.
test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(ARGS)

bench: $(STAMP) ## compare the speed with the published way of computing, in under five minutes
	$(RUN) benchmarks/speed.py --seconds 10 $(ARGS)

lint: $(STAMP) ## check the code with ruff
	$(RUN) -m ruff check .

clean: ## remove caches of Python, pytest and ruff (never data, runs or the environment)
	rm -rf .pytest_cache .ruff_cache
	find . \( -path ./.git -o -path ./dataset -o -path ./saved -o -path './$(VENV)' \) -prune \
		-o -type d -name __pycache__ -exec rm -rf {} +

# The stamp is written last, so an install that stopped half-way is taken up again the next time.
# --no-warn-conflicts: RecBole's own list of requirements is left out on purpose (requirements-nodeps.txt).
$(STAMP): requirements.txt requirements-nodeps.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) not found: name a Python 3.11 or newer with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) -V 2>&1`: name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "installing into $(VENV), takes a few minutes the first time"
	@rm -f $@
	@$(RUN) -m pip --version >/dev/null 2>&1 || \
		$(PYTHON) -m venv $$(test -f "$(VENV)/pyvenv.cfg" && echo --clear) "$(VENV)"
	@$(PIP) --no-warn-conflicts -r requirements.txt
	@$(PIP) --no-deps -r requirements-nodeps.txt
	@touch $@
