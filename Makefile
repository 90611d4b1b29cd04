# `make demo` and `make test` each do all the set-up they need, in .venv, from the tested set of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SETUP := pyproject.toml constraints.txt

DEVICE := cuda
OUT := benchmarks/results/gpu

.PHONY: demo test test-slow test-arviz1 lint docs test-site bench gpu faults fuzz mutants coverage precision clean

demo: $(VENV)/.base
	$(BIN)/pyro-vae demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# ArviZ 1.x needs Python 3.12: the same tests, in an environment of their own.
test-arviz1:
	$(MAKE) test PYTHON=python3.12 VENV=.venv-arviz1

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell pyro_vae docs/*.md docs/*/*.md README.md CHANGELOG.md CITATION.cff benchmarks/results/README.md
	$(BIN)/python docs/_ext/spelling.py

# The site, in docs/_build/html: a minute or two, most of it the figures of the gallery. Warnings are errors.
docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -n -W --keep-going -q docs docs/_build/html

# Opens each page of the built site in a headless Chromium, where there is one (Debian: chromium, chromium-driver).
test-site: docs $(VENV)/.test
	$(BIN)/python -m pytest tests/contract/test_site.py

# Alone on the machine, half an hour; the results lie in benchmarks/results.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.train --sets bars --threads 1 2 --out benchmarks/results/bars.json
	$(BIN)/python -m benchmarks.train --sets sizes batches estimators --repeats 7
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.stream

# All that asks for a GPU, in eight minutes, with the Python and the torch that are there; DEVICE=cpu rehearses it.
gpu:
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(PYTHON) -m benchmarks.gpu --device $(DEVICE) --out $(OUT)

# Kills training 100 times, damages files 1,000 times and reads 306 hostile run folders; the counts go to benchmarks/results/faults.json.
faults: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m faults

# Runs each file reader on mutated files, ten minutes in all (MINUTES=480 for a night), and counts the lines that they
# reach; files that reveal a fault go to fuzz/.
MINUTES := 10
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m faults.fuzz --minutes $(MINUTES)

# Plants a sample of small bugs, one by one, and lists those that no test sees; the counts go to
# benchmarks/results/mutants.json.
mutants: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m mutants

# How often each printed standard error covers the truth, ten minutes; the table is docs/coverage.md.
coverage: $(VENV)/.test
	cd tests && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m helpers.coverage_page

# The largest error of each density in single precision, a minute; the table is docs/precision.md.
precision: $(VENV)/.test
	cd tests && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m helpers.precision_page

clean:
	rm -rf $(VENV) .venv-arviz1 docs/_build docs/_figures docs/api docs/notebooks docs/measurements.md \
		docs/project/bibliography.md

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pyro-vae needs Python 3.11 or later; say which: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python $(SETUP)
	@echo "Installing pyro-vae and what it needs into $(VENV) (a minute or two) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	$(PIP) -e ".[lint]"
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e ".[docs]"
	@touch $@

$(VENV)/.bench: $(VENV)/.base
	$(PIP) -e ".[bench]"
	@touch $@
