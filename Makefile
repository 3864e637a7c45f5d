# make demo: install, then train a VP score model on digits, draw samples, score the test set (4 to 7 minutes).
# make test: install, then run the tests (6 to 10 minutes).
# Both need Python >= 3.11 and make, and install nothing twice. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# the tests start many processes: each would compile all modules anew
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test slow gpu lint clean install

demo: $(INSTALLED)
	$(BIN)/python experiments/vp.py --workdir=runs/demo --resume

# each worker gets one half of the files, so that what a file's tests share is made once, and helps the other at the end
WORKERS := -n 2 --dist worksteal

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

# the packages whose every function is typed to the last argument
STRICT := numerics sde_lib samplers likelihood guidance workflow

slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "slow and not gpu" --timeout 1800

# what needs a GPU, and its table; skipped where there is none
gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_gpu.py -m gpu --timeout 1800
	$(BIN)/python benchmarks/gpu.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent $(STRICT:%=-p %)

install: $(INSTALLED)

# torch first and pinned, so that nothing else pulls another build of it
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
