# Every target sets up what it needs in .venv, once; `make help` lists them.
# PYTHON=python3.12 chooses the interpreter, PIP_FLAGS="--index-url ..." where packages come from, BENCH_FLAGS what
# bench-generate, bench-gguf and bench-serve measure, TEST_WORKERS how many processes share the tests.

PYTHON ?= python3
PIP_FLAGS ?=
TEST_WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
# A file's tests stay together: what they share is made once.
PYTEST := $(BIN)/pytest -n $(TEST_WORKERS) --maxprocesses 8 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
INSTALL = $(PIP) install $(PIP_FLAGS) -c constraints.txt

# What was done is remembered under the hash of what it was done with. Of pyproject.toml, the part before the
# settings of test and lint tools counts.
CSRC_FILES := $(sort $(wildcard csrc/*/*.cpp csrc/*/*.h))
SETUP_HASH := $(shell sed '/^\[tool\.pytest/,$$d' constraints.txt setup.py pyproject.toml | sha256sum | cut -c1-16)
NATIVE_HASH := $(shell cat setup.py $(CSRC_FILES) | sha256sum | cut -c1-16)
INSTALLED := $(VENV)/.installed-$(SETUP_HASH)
TOOLS_INSTALLED := $(VENV)/.tools-$(SETUP_HASH)
NATIVE_BUILT := $(VENV)/.native-$(NATIVE_HASH)
# The other runtimes that bench-generate compares with live apart: they want an older transformers.
BENCH_VENV := .venv-bench
BENCH_PYTHON := $(BENCH_VENV)/bin/python
BENCH_PIP := $(BENCH_PYTHON) -m pip --disable-pip-version-check --no-input -qq
BENCH_INSTALL = $(BENCH_PIP) install $(PIP_FLAGS) -c benchmarks/constraints.txt
BENCH_HASH := $(shell sed '/^\[tool\.pytest/,$$d' benchmarks/constraints.txt setup.py pyproject.toml | sha256sum | cut -c1-16)
BENCH_INSTALLED := $(BENCH_VENV)/.installed-$(BENCH_HASH)
BENCH_FLAGS ?=
SANITIZED := build/sanitized
SANITIZED_BUILT := $(SANITIZED)/.built-$(NATIVE_HASH)

.PHONY: help demo test test-slow docs lint format bench bench-generate bench-gguf bench-serve notebooks sanitize rehearse-gpu install clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(NATIVE_BUILT)  ## Answer and edit with SmolLM2 (or the bundled pair, offline), plainly and speculatively
	@$(BIN)/python tools/demo.py

test: $(NATIVE_BUILT) $(TOOLS_INSTALLED)  ## The default tests
	@$(PYTEST)

test-slow: $(NATIVE_BUILT) $(TOOLS_INSTALLED)  ## The long versions of the tests
	@$(PYTEST) -m "slow and not gpu"

docs: $(NATIVE_BUILT) $(TOOLS_INSTALLED)  ## Build the site into build/site (open build/site/index.html)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

bench: $(NATIVE_BUILT) $(TOOLS_INSTALLED)  ## Microbenchmarks, one per op
	@$(BIN)/pytest --benchmark-only

bench-generate: $(NATIVE_BUILT) $(BENCH_INSTALLED)  ## End-to-end generation beside other runtimes (BENCH_FLAGS="--help")
	@PIP_FLAGS="$(PIP_FLAGS)" $(BENCH_PYTHON) benchmarks/bench_generate.py $(BENCH_FLAGS)

bench-gguf: $(NATIVE_BUILT) $(BENCH_INSTALLED)  ## SmolLM2 from one GGUF file, beside llama.cpp (BENCH_FLAGS="--help")
	@$(BIN)/python -m specengine fetch smollm2 > /dev/null
	@PIP_FLAGS="$(PIP_FLAGS)" $(BENCH_PYTHON) benchmarks/bench_gguf.py $(BENCH_FLAGS)

bench-serve: $(NATIVE_BUILT) $(TOOLS_INSTALLED)  ## The server, beside llama.cpp's and beside the library (BENCH_FLAGS="--help")
	@$(BIN)/python -m specengine fetch smollm2 > /dev/null
	@PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python benchmarks/bench_serve.py $(BENCH_FLAGS)

notebooks: $(NATIVE_BUILT) $(TOOLS_INSTALLED)  ## Execute examples/notebooks anew (some minutes)
	@$(BIN)/python tools/notebooks.py

lint: $(NATIVE_BUILT) $(TOOLS_INSTALLED)  ## ruff, mypy, import-linter, clang-format; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(call link_package,build/typing)
	@touch build/typing/specengine/_C.py
	cd build/typing && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir /dev/null
	cd build/typing && $(CURDIR)/$(BIN)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache
	$(BIN)/clang-format --dry-run -Werror $(CSRC_FILES)

format: $(NATIVE_BUILT) $(TOOLS_INSTALLED)  ## Format Python and C++ in place
	$(BIN)/python tools/option_types.py
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC_FILES)

sanitize: $(SANITIZED_BUILT)  ## The C++ tests under AddressSanitizer and UBSan
	$(call link_package,$(SANITIZED)/tree)
	@ln -s $(CURDIR)/$(SANITIZED)/lib/specengine/_C*.so $(SANITIZED)/tree/specengine/
	@libraries="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libstdc++.so)"; \
	export PYTHONPATH=$(CURDIR)/$(SANITIZED)/tree LD_PRELOAD="$$libraries" ASAN_OPTIONS=detect_leaks=0; \
	(cd build && ../$(BIN)/python -c "import torch; from specengine import _C; assert 'sanitized' in _C.__file__, _C.__file__") && \
	$(PYTEST) -p no:cacheprovider -m "not triton and not slow and not gpu" tests/test_paged_kv_cache.py tests/test_native_program.py tests/test_native_threads.py tests/test_suffix_automaton.py tests/kernels

rehearse-gpu:  ## A visit to a GPU machine without network, rehearsed here (5 GB, once)
	@PYTHON=$(if $(filter file,$(origin PYTHON)),,$(PYTHON)) PIP_FLAGS="$(PIP_FLAGS)" bash tools/rehearse_gpu.sh

install: $(NATIVE_BUILT)  ## Only set up .venv: dependencies, the package in place, its extension

clean:  ## Remove what was built, .venv included
	rm -rf $(VENV) $(BENCH_VENV) build specengine/_C*.so *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(INSTALLED):
	@command -v $(PYTHON) > /dev/null || { echo "specengine: $(PYTHON) was not found; install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) tools/check_machine.py
	@echo "Setting up $(VENV) (once; some minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) torch numpy setuptools wheel ninja
	@$(INSTALL) --no-build-isolation -e .
	@rm -f $(VENV)/.installed-* $(VENV)/.native-*
	@touch $@ $(NATIVE_BUILT)

# The install above has built the extension; after that, only what changed is compiled again.
$(NATIVE_BUILT): | $(INSTALLED)
	@test -f $@ || { echo "Building the C++ extension ..." && $(call quietly,$(BIN)/python setup.py build_ext --inplace); }
	@rm -f $(VENV)/.native-*
	@touch $@

$(TOOLS_INSTALLED): | $(INSTALLED)
	@echo "Installing test and lint tools ..."
	@$(BIN)/python tools/requirements.py dev > $(VENV)/tools.txt
	@$(INSTALL) -r $(VENV)/tools.txt
	@rm -f $(VENV)/.tools-*
	@touch $@

# llama.cpp is built by the benchmarks themselves, as this processor allows; only what its package imports comes here.
# optimum-intel asks for torchvision, which nothing here uses, and transformers fails where there is one that was
# built for another torch.
$(BENCH_INSTALLED): | $(INSTALLED)
	@echo "Setting up $(BENCH_VENV) (once; some minutes) ..."
	@test -x $(BENCH_PYTHON) || $(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_INSTALL) torch numpy setuptools wheel ninja
	@$(BIN)/python tools/requirements.py bench | sed 's/^llama-cpp-python.*/diskcache/' > $(BENCH_VENV)/requirements.txt
	@$(BENCH_INSTALL) -r $(BENCH_VENV)/requirements.txt
	@$(BENCH_PYTHON) -c "import torchvision" 2> /dev/null || $(BENCH_PIP) uninstall --yes torchvision
	@$(BENCH_INSTALL) --no-build-isolation -e .
	@rm -f $(BENCH_VENV)/.installed-*
	@touch $@

$(SANITIZED_BUILT): | $(TOOLS_INSTALLED)
	@echo "Building the C++ extension with sanitizers ..."
	@rm -rf $(SANITIZED)/lib
	@$(call quietly,SPECENGINE_SANITIZE=1 $(BIN)/python setup.py build_ext \
		--build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp)
	@rm -f $(SANITIZED)/.built-*
	@touch $@

# A compiler's output matters when it fails.
quietly = mkdir -p build && $(1) > build/compile.log 2>&1 || { cat build/compile.log >&2; exit 1; }

# The package's modules and its kernels live in two folders: tools that don't ask setuptools see them here as one.
define link_package
@rm -rf $(1)/specengine && mkdir -p $(1)/specengine
@ln -s $(CURDIR)/specengine/* $(CURDIR)/kernels $(1)/specengine/
@rm -rf $(1)/specengine/__pycache__ $(1)/specengine/_C*.so
endef
