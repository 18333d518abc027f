# Needs Python 3.11+ and make; everything else goes into .venv, at the versions of constraints.txt.
#
#   make demo    train, certify, attack and report on 5,000 real digits; writes runs/demo/
#   make test    the whole test suite
#   make check   lint, types and the quick tests
#   make bench   the benchmarks; writes benchmarks/results/
#   make compare OTAD and its rivals on five data sets (needs OTAD_DATA or ../shared/data; see otad info); writes
#                runs/compare/ (more than an hour; goes on where it stopped)
#   make clean   remove .venv and every cache

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# One process per core with one thread each: threads of several processes on the same cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

# Data sets that are not part of a package: the neighbouring folder, unless the variable says otherwise.
ifndef OTAD_DATA
ifneq ($(wildcard ../shared/data),)
export OTAD_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: demo test check bench compare clean
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/otad demo

test: $(VENV)/.test
	$(PYTEST)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) -m "not slow"

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py

# Five data sets in one folder; small tables need less training time than images.
compare: $(VENV)/.rivals
	$(BIN)/otad compare mnist --n-train 4000 --n-test 500 --n-attacked 100 --budget 3
	$(BIN)/otad compare fashion-mnist --n-train 6000 --n-test 500 --n-attacked 100 --budget 2
	$(BIN)/otad compare pbmc68k --n-attacked 100 --budget 1
	$(BIN)/otad compare steel-plates --n-attacked 200 --budget 1
	$(BIN)/otad compare sensorless-drive --n-attacked 200 --budget 1

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment holds Python and PyTorch only; the stamps below add otad with what each job needs.
$(VENV)/.torch: constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "make: '$(PYTHON)' was not found; install Python 3.11 or newer, or run: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: otad needs Python 3.11 or newer and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); run: make PYTHON=python3.12" >&2; exit 1; }
	@echo "otad: making $(VENV) with $$("$(PYTHON)" -V) ..."
	@"$(PYTHON)" -m venv $(VENV) || { \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "otad: installing PyTorch (the largest part, some minutes on a slow line) ..."
	@$(PIP) install -c constraints.txt torch hatchling editables
	@touch $@

# The build back end is already there, pinned: no second environment just to build.
define install
	@echo "otad: installing otad$(1) and what it needs ..."
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".$(1)"
	@touch $@
endef

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(call install)
$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(call install,[test])
$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(call install,[dev])
$(VENV)/.rivals: $(VENV)/.torch pyproject.toml
	$(call install,[rivals])
$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(call install,[bench])
