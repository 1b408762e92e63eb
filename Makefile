PYTHON ?= python3
VENV ?= .venv
ARGS ?=

STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help install demo app test test-fast check bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=python3.12 chooses the interpreter, VENV=dir the environment, ARGS='...' goes to demo, app, the tests and bench"

install: $(STAMP) ## create the virtual environment and install the pinned requirements

demo: $(STAMP) ## run the whole model on a small example
	$(RUN) demo.py $(ARGS)

app: $(STAMP) ## serve the page on the bundle of the demo (run the demo first)
	@test -d saved/demo/bundle || { echo "saved/demo/bundle: no such folder; run make demo first" >&2; exit 1; }
	$(RUN) serve.py saved/demo/bundle --compare saved/amazon-minilm --compare untrained \
		--histories saved/demo/dataset/downstream/Drama/Drama.test.inter $(ARGS)

# Each process has one thread: the models of the tests are so small that threads would mostly wait for one another.
# loadfile: the tests of a file run in one process, so its fixtures are made once.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=2 --dist=loadfile

test: $(DEV) ## run the tests in two processes
	$(PYTEST) $(ARGS)

test-fast: $(DEV) ## run the tests that are not marked slow, in under a minute
	$(PYTEST) -m "not slow" $(ARGS)

check: $(DEV) ## check style, spelling, types and the links in Markdown
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib
	$(RUN) -m mypy
	$(RUN) -m tests.links

bench: $(STAMP) ## compare the speed with the published way of computing, in under five minutes
	$(RUN) benchmarks/speed.py --seconds 10 $(ARGS)

clean: ## remove the caches of Python and of the tools (never data, runs or the environment)
	rm -rf .pytest_cache .ruff_cache .mypy_cache
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

# requirements.txt as constraints: no tool changes a version that the project pins.
$(DEV): $(STAMP) requirements-dev.txt
	@$(PIP) --no-warn-conflicts -r requirements-dev.txt -c requirements.txt
	@touch $@
