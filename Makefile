# make run: the quickstart. make test: the quick tests. make check: all that CI checks. make slow: all other tests, among them
# those of real deployments, which mostly wait; make faults: of those, sites that die or are cut off. Each sets up what it
# needs, in .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# What is installed is compiled when it is first imported: most of it never is.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt

.PHONY: run test slow docs faults check format lint types clean

run: .venv/installed
	$(BIN)/fedkeel run recipes/quickstart.toml --fresh

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

slow: .venv/installed-dev .venv/llama-cpp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m slow
	OMP_NUM_THREADS=1 $(BIN)/pytest pretrain/tests

# Without it the tests that need it skip, and say so.
.venv/llama-cpp: | .venv/installed-dev
	$(INSTALL) -e '.[llama-cpp]' \
	  && touch $@ || echo "llama-cpp-python could not be built: GGUF files are not compared with llama.cpp"

docs: .venv/installed-docs
	$(BIN)/python tools/docs_site.py
	@echo "site: build/site/html/index.html"

.venv/installed-docs: pyproject.toml constraints.txt | .venv/installed-dev
	$(INSTALL) -e '.[docs]'
	@touch $@ .venv/installed .venv/installed-dev

faults: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m faults

check: format lint types test docs

format: .venv/installed-dev
	$(BIN)/ruff format --check .

lint: .venv/installed-dev
	$(BIN)/ruff check .

types: .venv/installed-dev
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FedKeel needs Python 3.11 or newer; say which with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e .
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[dev,hub,flower]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv build dist runs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
