# The commands to remember: make train, make test, make test-fast, make test-oldest, make soak,
# make sanitize, make bench, make gpu-check, make lint, make docs, make dist.
# ARGS passes flags on: make train ARGS="--data fashion-mnist --model convnet"
PYTHON ?= python3
ARGS ?=
ENV := .venv
BIN := $(ENV)/bin
# Two sizes of the environment: what `fastmp train` needs, and with it what the tests need.
TRAIN := $(ENV)/.installed-train
STAMP := $(ENV)/.installed
CONSTRAINTS := constraints.txt
PIP := $(BIN)/pip --quiet --disable-pip-version-check

.PHONY: train test test-fast test-oldest soak sanitize bench gpu-check lint format docs dist clean

# Mixed precision whatever the machine: on its own, --dtype auto takes fp32 where that is as fast.
train: $(TRAIN)
	@echo "make train: a classifier of handwritten digits, in bf16 with fp32 masters"
	@$(BIN)/fastmp train --dtype bf16 $(ARGS)

# A process on every core. ARGS="-n 0 tests/optim" runs in one.
PYTEST := $(BIN)/python -m pytest
# A file stays in one process: its fixtures are built once, and its large tests never run side by side.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
test: $(STAMP)
	$(PYTEST) $(PARALLEL) $(ARGS)

# Without the tests marked slow: under 3 minutes on 2 cores.
test-fast: $(STAMP)
	$(PYTEST) $(PARALLEL) -m "not slow" $(ARGS)

# The suite on the oldest supported versions, in an environment of its own. PyPI's torch 2.11 is a CUDA
# build: 3 GB with its libraries, which runs on a CPU too.
OLDEST := numpy==2.0.2 pillow==10.1.0 torch==2.11.0 triton==3.6.0
OLDEST_CONSTRAINTS := build/constraints-oldest.txt
test-oldest: $(OLDEST_CONSTRAINTS)
	$(MAKE) test ENV=.venv-oldest CONSTRAINTS=$<

# nvidia-cuda-nvrtc is of the release that this torch asks for.
$(OLDEST_CONSTRAINTS): constraints.txt Makefile
	mkdir -p build
	grep -vE '^(numpy|nvidia-cuda-nvrtc|pillow|torch|triton)==' $< > $@
	printf '%s\n' $(OLDEST) >> $@

# The kill loops in full: 20 runs killed and resumed, 50 saves killed; memory over 20,000 steps.
soak: $(STAMP)
	FASTMP_SOAK=1 $(BIN)/python -m pytest tests/robustness tests/checkpoint/test_manager.py \
		$(ARGS)

# The CPU library under AddressSanitizer and UBSan: its C ABI fuzzed, then the tests of every operation
# on it. The leak check is off: Python and torch free at exit only what they want to.
# --capture=sys: a report of AddressSanitizer is written past Python.
SANITIZE := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
SANITIZED_TESTS := $(addprefix tests/,amp functional ops optim data/test_mixup.py \
	$(addprefix backends/test_,abi.py cpu_gemm.py numerics.py) \
	$(addprefix compat/test_torch_,operators.py optimizers.py scaler.py))
RUNS ?= 200000
sanitize: $(STAMP)
	mkdir -p build
	$(CXX) -std=c++17 -g -O1 $(SANITIZE) -ffp-contract=fast -fno-exceptions -fno-rtti \
		-DFASTMP_TARGET=base -o build/fuzz-abi tests/kernels/fuzz/abi.cpp csrc/cpu/*.cpp
	build/fuzz-abi $(RUNS)
	CXXFLAGS="-g $(SANITIZE)" $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-S csrc -B build/sanitize
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 FASTMP_TEST_LIBRARY=$(CURDIR)/build/sanitize/libfastmp_cpu.so \
		$(BIN)/python -m pytest --capture=sys $(SANITIZED_TESTS) $(ARGS)

bench: $(STAMP)
	$(BIN)/fastmp bench --out benchmarks/results $(ARGS)

# On a machine with a GPU, which may have no network: with its own python, torch and Triton.
RESULTS ?= build/gpu-check-results
gpu-check:
	$(PYTHON) -m benchmarks.tools.gpu_check $(RESULTS) $(ARGS)

# Linked as one program, the files of the CPU library must agree on every type they name (the one
# definition rule): the linker keeps one copy of a function, whichever file it comes from.
lint: $(STAMP) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')
	mkdir -p build
	$(CXX) -std=c++17 -O1 -flto=auto -Werror=odr -Werror=lto-type-mismatch -shared -fPIC \
		-DFASTMP_TARGET=base -o build/odr.so csrc/cpu/*.cpp

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

# The site of docs/, with an API page for each module, in build/site. A broken link is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The source archive and this platform's wheel in dist/, as they would be published.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	test -z "$$(find dist -size +2000k)"

# The native library is rebuilt whenever its sources or the package description change. torch is
# pinned by constraints.txt and never asked for unpinned. A line a phase: pip says nothing. The library
# needs no torch, so the two are installed side by side; modules are compiled when they are imported.
SOURCES := pyproject.toml $(CONSTRAINTS) $(shell find csrc -type f)
define NEEDED
import tomllib
p = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*p["dependencies"], *p["optional-dependencies"]["train"])
endef
export NEEDED
$(TRAIN): $(SOURCES)
	@echo "make: a virtual environment in $(ENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(ENV)
	@echo "make: PyTorch $(shell sed -n 's/^torch==//p' $(CONSTRAINTS)) and what training needs; beside it fastmp's native library"
	@$(PIP) install --constraint $(CONSTRAINTS) scikit-build-core cmake ninja
	@$(PIP) install --no-compile --constraint $(CONSTRAINTS) $$($(BIN)/python -c "$$NEEDED") & pid=$$!; \
	FASTMP_REQUIRE_NATIVE=1 $(PIP) install --no-deps --no-build-isolation --editable . && wait $$pid
	@touch $@

$(STAMP): $(TRAIN)
	@echo "make: what tests, lint and pages need"
	@FASTMP_REQUIRE_NATIVE=1 $(PIP) install --constraint $(CONSTRAINTS) \
		--no-build-isolation --editable '.[dev]'
	@$(PIP) install --constraint $(CONSTRAINTS) --no-deps timm
	@touch $@

clean:
	rm -rf .venv .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
