# make book   a fresh machine: environment, install, run every notebook on real data, build the site, say where it is
# make test   a fresh machine: environment, install, all tests but the slow ones
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export LLMBOOK_PYTHON := $(BIN)/python

.PHONY: book test test-all lab site nbs bench hooks clean
.DEFAULT_GOAL := book

book: $(READY)
	$(BIN)/llmbook notebooks run --out build/book
	$(BIN)/llmbook site --notebooks build/book

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 -m "not slow"

test-all: $(READY)
	$(BIN)/nbdev_test --n_workers 1 --do_print --timing --flags slow
	$(BIN)/python -m pytest

lab: $(READY) hooks
	$(BIN)/jupyter lab --notebook-dir=nbs

site: $(READY)
	$(BIN)/llmbook site

nbs: $(READY)
	$(BIN)/llmbook notebooks run
	$(BIN)/nbdev_export

bench: $(READY)
	$(BIN)/llmbook bench

hooks: $(READY)
	$(BIN)/nbdev_install_hooks

# Python 3.11 or later and its venv module are all that is asked for; everything else comes from pip.
$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'llmbook needs Python 3.11 or later, and $(PYTHON) is ' + sys.version.split()[0] + ': name another one, as in: make PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf build dist _proc _docs runs *.egg-info
