# The commands to remember: make train, make test, make soak, make bench, make gpu-check, make lint.
# ARGS passes flags on: make train ARGS="--data fashion-mnist --model convnet"
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: train test soak bench gpu-check lint format clean

train: $(STAMP)
	$(BIN)/fastmp train $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# The kill loops in full: 20 runs killed and resumed, 50 saves killed.
soak: $(STAMP)
	FASTMP_SOAK=1 $(BIN)/python -m pytest tests/test_resume.py tests/test_checkpoints.py $(ARGS)

bench: $(STAMP)
	$(BIN)/fastmp bench --out benchmarks/results $(ARGS)

# On a machine with a GPU, which may have no network: with its own python, torch and Triton.
RESULTS ?= build/gpu-check-results
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(RESULTS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

# The native library is rebuilt whenever its sources or the package description change. torch is
# pinned by constraints.txt and never asked for unpinned.
$(STAMP): pyproject.toml constraints.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt scikit-build-core cmake ninja
	FASTMP_REQUIRE_NATIVE=1 $(BIN)/pip install --quiet --constraint constraints.txt \
		--no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
