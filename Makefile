# Two commands do all the set-up: `make marketing` runs the main job, `make test` passes the tests.
# Variables: PYTHON (3.11 or newer), VENV (where to install; VENV=$VIRTUAL_ENV uses the environment you are in and
# leaves a torch that is already there alone), RECIPE, RUN, WORK (40 GB for `make bench`, which needs a GPU).
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= marketing
RUN ?= runs/$(RECIPE)
WORK ?= /dev/shm/loragraft-bench
BIN := $(VENV)/bin

.PHONY: setup marketing run demo setup-dev check test test-gpu bench wheel clean

setup: $(VENV)/.loragraft
$(VENV)/.loragraft: pyproject.toml requirements/torch.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet -r requirements/torch.txt
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# The main job on the embedded base: train, draw before and after, score.
marketing: run
run: setup
	$(BIN)/accelerate launch train/lora.py --recipe $(RECIPE) --out $(RUN)
	$(BIN)/loragraft generate --adapter $(RUN) --compare --out $(RUN)/images
	$(BIN)/loragraft score $(RUN)

# A browser page on this machine with everything that was trained into runs/.
demo: $(VENV)/.loragraft-demo
	mkdir -p runs
	$(BIN)/loragraft demo --adapters runs --open
$(VENV)/.loragraft-demo: $(VENV)/.loragraft
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

setup-dev: $(VENV)/.loragraft-dev
$(VENV)/.loragraft-dev: $(VENV)/.loragraft
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one torch thread each: most tests are Python, and two processes of two threads get in each other's way.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: setup-dev
	$(BIN)/python -m pytest -m gpu

bench: setup
	$(BIN)/python benchmarks/int4_engine.py --out benchmarks/results/int4_engine.json --commit $$(git rev-parse HEAD) --work $(WORK)

wheel: setup-dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
