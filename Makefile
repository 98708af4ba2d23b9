PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
LONG := runs/long
STEPS ?=
# A worker more than there are cores: some tests wait for other processes. A file's tests run in one
# worker, so that its fixtures are made once.
WORKERS ?= $(shell expr 1 + $$(getconf _NPROCESSORS_ONLN))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=40

.PHONY: install quickstart train-long test test-all pytest coverage lint lock clean

install: $(VENV)/.installed

# --no-deps: the lock is complete, and of the embedded corpus only the files are used. Modules are
# compiled on all cores; those that are no valid Python, such as templates, are skipped.
$(VENV)/.installed: requirements/cpu.txt requirements/embedded.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14) and \
	  f"Python 3.11, 3.12 or 3.13 is needed, {sys.version.split()[0]} was found: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
	  --require-hashes -r requirements/cpu.txt -r requirements/embedded.txt
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Large pages for a step's arrays, where the system's C library is glibc.
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: install
	$(BIN)/python train.py --config configs/quickstart.py --workdir $(RUN) $(if $(STEPS),--training.steps $(STEPS))
	@echo
	$(BIN)/python sample.py --checkpoint $(RUN) --num 3 --sampler event_jump --trace $(RUN)/trace.html
	@echo
	$(BIN)/python sample.py --checkpoint $(RUN) --sampler event_jump --infill 'Fellow citizens of the Senate and{mask:12} the state of the Union is{mask:10}.'
	@echo
	@ls -1d $(RUN)/checkpoints $(RUN)/curves.png $(RUN)/metrics.jsonl $(RUN)/trace.html

# A larger model of the same text, for an hour or, with more STEPS, a night; started again it resumes.
train-long: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
train-long: install
	$(BIN)/python train.py --config configs/sotu_radd.py --workdir $(LONG) $(if $(STEPS),--training.steps $(STEPS))
	@echo
	$(BIN)/python sample.py --checkpoint $(LONG) --num 3 --sampler event_jump --trace $(LONG)/trace.html

# Everything that a change must pass. Pyright uses one core, and runs beside the tests.
test: install
	$(MAKE) --jobs 2 lint pytest

pytest: install
	$(PYTEST)

# The nightly tests as well: further models, compilation at full size, 20 kills.
test-all: install lint
	SEDD_FAULTS=20 $(PYTEST) -m "not gpu"

# Which lines the tests reach.
coverage: install
	$(PYTEST) --cov=sedd --cov-report=term:skip-covered

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Pins every dependency with its hashes, for every supported Python, without naming a host.
lock: install
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-annotate --extra dev pyproject.toml -o requirements/cpu.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-annotate --no-deps requirements/embedded.in -o requirements/embedded.txt

clean:
	rm -rf $(VENV) runs build *.egg-info
