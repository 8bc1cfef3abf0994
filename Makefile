# Needs Python 3.11 and make; everything else comes from the package index.
#
#   make demo    environment, install, and the main job: a real transformer and a real CNN become int8 programs
#   make test    environment, install, lint, types and tests; about a quarter of an hour on two cores
#
# Both are idempotent. The environment is built once and again only when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The ends of the ranges in pyproject.toml and quant2e/versions.py: `make test` runs on the oldest releases, `make
# test-newest` on the newest.
OLDEST := torch==2.13.* executorch==1.4.*
NEWEST := torch==2.14.* executorch==1.5.*
NEWEST_VENV ?= .venv-newest
PIP_ARGS ?=

# The tests run side by side, one thread each; what they compile, they compile in their own process.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST_ARGS ?=
COVERAGE := 85

.PHONY: help install demo lint format test test-all test-newest sanitize wheel fuzz mutants peers zoo site clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "make test-all  make test, and the tests marked slow, with coverage: long, and they rarely break. Run it before you land"
	@echo "make test-newest  the tests of make test on the newest torch and ExecuTorch, in an environment of its own"
	@echo "make sanitize  the tests of the native kernels, built with AddressSanitizer and UBSan (some minutes; needs g++ or clang++ with both)"
	@echo "make wheel   builds the wheel, installs it with torch alone into a clean environment, and uses it there"
	@echo "make fuzz    programs that nobody wrote, for HOURS=1 or MINUTES=10, with SEED=1; the counts go to FUZZ_OUT=fuzz_counts.md"
	@echo "make mutants plants bugs in a copy of the tree, one at a time, and says which test found each (half an hour)"
	@echo "make peers   torchao's and ExecuTorch's own tests, from the checkouts TORCHAO=folder and EXECUTORCH=folder; they write docs/peers_tests.md, or PEERS_OUT=file"
	@echo "make zoo     some sixty architectures through everything, compared with docs/zoo.md; UPDATE=1 stores the rows, MISSING=1 runs what did not run yet (half an hour)"
	@echo "make site    the pages and the reference as a site in build/site, links checked"
	@echo "make lint    ruff and mypy only"
	@echo "make format  let ruff mend what it can"
	@echo "make clean   remove the environment and everything generated"

# $(call installed,BIN,RELEASES): quant2e with all extras and these releases.
installed = echo "==> installing $(2)" && \
	$(1)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) $(foreach one,$(filter torch==%,$(2)),"$(one)") && \
	echo "==> installing quant2e with all extras (editable; a few minutes the first time)" && \
	$(1)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --editable ".[all]" $(foreach one,$(2),"$(one)")

install: $(INSTALLED)

# torch first, and alone: the version pin then holds before any other package has a say in it.
$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3.11 on PATH; install Python 3.11 or run make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "==> environment in $(VENV) ($$("$(PYTHON)" --version))"
	@"$(PYTHON)" -m venv $(VENV) || { echo "error: cannot create a virtual environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@$(call installed,$(BIN),$(OLDEST))
	@touch $@

# A CUDA build of torch is not needed: where an index has CPU builds, PIP_ARGS="--extra-index-url address" takes those.
$(NEWEST_VENV)/.installed: pyproject.toml
	@echo "==> environment in $(NEWEST_VENV)"
	@"$(PYTHON)" -m venv $(NEWEST_VENV)
	@$(call installed,$(NEWEST_VENV)/bin,$(NEWEST))
	@touch $@

demo: $(INSTALLED)
	@echo "==> the main job: results go to demo_output/"
	@$(BIN)/python -m benchmarks.demo --out demo_output

# All three run, so that one run says everything that is wrong.
lint: $(INSTALLED)
	@status=0; \
	echo "==> ruff check"; $(BIN)/ruff check || status=1; \
	echo "==> ruff format --check"; $(BIN)/ruff format --check || status=1; \
	echo "==> mypy"; $(BIN)/mypy || status=1; \
	exit $$status

format: $(INSTALLED)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# For the same reason the tests run even when lint fails: beside it, and what lint says stands behind what they say.
# Coverage, which makes them half as fast, belongs to the long target; it has a floor when all tests run.
test: MARKED := -m "not slow" $(PYTEST_ARGS)
test-all: MARKED := --cov --cov-report=term $(or $(PYTEST_ARGS),--cov-fail-under=$(COVERAGE))
test test-all: $(INSTALLED)
	@said=$$(mktemp); $(MAKE) --no-print-directory lint >"$$said" 2>&1 & linting=$$!; \
	trap 'kill $$linting 2>/dev/null; rm -f "$$said"' EXIT; \
	echo "==> pytest on $(WORKERS) workers, and lint beside it"; \
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(MARKED); \
	tests=$$?; \
	wait $$linting; lint=$$?; cat "$$said"; \
	[ $$lint = 0 ] || echo "==> lint failed: see above"; \
	[ $$lint = 0 ] && [ $$tests = 0 ]

# Lint and types are those of the oldest: what differs between the releases is what tests find.
test-newest: $(NEWEST_VENV)/.installed
	@$(NEWEST_VENV)/bin/python -c 'import torch, importlib.metadata as m; print("==> torch", torch.__version__, "and executorch", m.version("executorch"))'
	@echo "==> every name that is taken from a library is there"
	@$(NEWEST_VENV)/bin/python -m pytest -q tests/test_versions.py
	@echo "==> pytest on $(WORKERS) workers"
	@OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

# What the kernels read and write beyond their memory, and what C++ leaves undefined, ends the run. Leaks are Python's.
CXX ?= g++
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1
SANITIZED ?= tests/lowering/native
sanitize: $(INSTALLED)
	@echo "==> native kernels under AddressSanitizer and UBSan"
	@OMP_NUM_THREADS=1 QUANT2E_CACHE_DIR=build/sanitize QUANT2E_NATIVE_FLAGS="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest -q -p no:cacheprovider -s $(PYTEST_ARGS) $(SANITIZED)

# build/wheel holds two environments: one that builds, and one in which nothing but torch and the wheel is installed.
wheel:
	@"$(PYTHON)" tests/wheel/build_and_try.py "$(firstword $(OLDEST))"

HOURS ?= 1
MINUTES ?= $(shell echo $$(( $(HOURS) * 60 )))
SEED ?= 1
FUZZ_OUT ?= fuzz_counts.md
fuzz: $(INSTALLED)
	@OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED) --out $(FUZZ_OUT)

mutants: $(INSTALLED)
	@$(BIN)/python -m tests.mutants

PEERS_OUT ?= docs/peers_tests.md
peers: $(INSTALLED)
	@OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m tests.peers $(if $(TORCHAO),--torchao "$(TORCHAO)") $(if $(EXECUTORCH),--executorch "$(EXECUTORCH)") --out $(PEERS_OUT)

zoo: $(INSTALLED)
	@OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m tests.zoo $(if $(UPDATE),--update) $(if $(MISSING),--missing) $(NAMES)

site: $(INSTALLED)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[site]"
	@$(BIN)/python docs/gather_pages.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "==> build/site/index.html"

clean:
	rm -rf $(VENV) $(NEWEST_VENV) fuzz_counts.md build dist *.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache demo_output
