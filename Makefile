# Every target installs what it needs; the second time that costs nothing.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/installed
PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt
# Test processes of one thread each: on two cores twice as fast as one process of two threads.
WORKERS ?= 2

.PHONY: setup demo test check docs fuzz bench kills soak scaling published intervals ladder models chromium constraints

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kinvec needs Python 3.11 or newer: make setup PYTHON=python3.11"; exit 1; }
	@echo "installing into .venv: a few minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[demo,dev,track]'
	@touch $@

demo: setup
	$(BIN)/kinvec demo --out runs/demo

test: setup chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS)

published: setup
	$(BIN)/python -m pytest -m long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/docs.py --check

docs: setup
	$(BIN)/python scripts/docs.py

# Every reader against damaged files, guided by coverage: so many seconds for each.
SECONDS ?= 60
fuzz: setup
	@$(PIP) --no-build-isolation --editable '.[fuzz]'
	$(BIN)/python fuzz/targets.py all $(SECONDS)

bench: setup
	$(BIN)/python benchmarks/speed.py

# Four verbs killed at 50 random moments each; stopped, the same command goes on.
soak: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/soak.py

scaling: setup
	$(BIN)/python benchmarks/scaling.py

kills: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/kills.py

intervals: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/intervals.py

ladder: setup
	$(BIN)/python benchmarks/ladder.py

models: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/models.py

chromium:
	@bash scripts/install-chromium.sh

# After a change of dependencies: what a full install holds now, without hosts, paths or build tags.
constraints: setup
	@$(PIP) --no-build-isolation --editable '.[fuzz]'
	{ echo '# Every package of a full install (demo, dev, track, fuzz), so that a fresh machine gets the same. Written by `make constraints`.'; \
	  $(BIN)/python -m pip freeze --all --exclude pip --exclude kinvec | sed 's/+cpu$$//' | LC_ALL=C sort -f; } > constraints.tmp
	mv constraints.tmp constraints.txt
	@touch $(SETUP)
