# The commands of this repository; `make help` lists them. A fresh machine needs Python >= 3.10, a C++ compiler and make.
# Everything goes into $(VENV). A second run does only what a change asks for.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
TORCH_SPEC := $(if $(findstring torch,$(TORCH)),$(TORCH),torch==$(TORCH))
PYTHON_FILES := natrpb tests examples benchmarks setup.py
NATIVE_FILES := $(shell find csrc tests/cpp tests/emulator -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The CUDA toolkit: CUDA_HOME, else that of the nvcc on PATH (which may be a script that calls another). `make build` leaves the
# CUDA kernels out where there is none; the tests, which compile them for every architecture, then take NVIDIA's packages of PyPI.
CUDA_TOOLKIT := $(or $(CUDA_HOME),$(CUDA_PATH),$(shell nvcc -dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^\#\$$ TOP=//p'))
TOOLKIT_STAMP := $(if $(CUDA_TOOLKIT),,$(STAMPS)/cuda)
CUDA_TO_TEST := $(or $(CUDA_TOOLKIT),$(abspath $(VENV))/cuda/nvidia/cu13)
CUDA_ARCHITECTURES := 8.0;9.0;10.0;12.0+PTX

.DELETE_ON_ERROR:
.PHONY: help demo test bench build lint format cpp-test cuda-check emulator-test arm-check gpu-check wheel clean FORCE

help:
	@echo 'make demo       train a small NAT on handwritten digits and write pictures of what it learned'
	@echo 'make test       lint, C++ tests (plain and under sanitizers), Python tests; all CUDA kernels compiled and emulated'
	@echo 'make bench      time the ops beside their peers'
	@echo 'make build      compile and install natrpb into $(VENV), editable'
	@echo 'make lint       ruff and clang-format, changing nothing'
	@echo 'make format     ruff and clang-format, in place'
	@echo 'make cpp-test   the C++ tests only, those of the emulated CUDA kernels included'
	@echo 'make cuda-check compile the CUDA kernels for every architecture and look at the machine code; needs no GPU'
	@echo 'make emulator-test  the Python tests of the ops, on the emulated CUDA kernels'
	@echo 'make arm-check  the C++ tests of the CPU kernels for aarch64; needs aarch64-linux-gnu-g++ and qemu-aarch64'
	@echo 'make gpu-check  on a machine with a GPU: build, tests, sanitizers, benchmarks, counters; PART=tests does one of them'
	@echo 'make wheel      a wheel in dist/'
	@echo 'make clean      remove what was built (not $(VENV))'
	@echo
	@echo 'PYTHON=python3.12 makes $(VENV) with another Python, VENV=dir puts it elsewhere;'
	@echo 'TORCH=2.12.0 (or a full requirement) takes another torch, in every command it is given to.'

# Kernels for GPUs take minutes to compile; without a driver no GPU waits for them.
demo bench: export NATRPB_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)

demo: build $(STAMPS)/demo
	$(PY) -m examples.digits

test: lint build cpp-test $(STAMPS)/test
	$(PY) -m pytest -n 2
	$(EMULATED_PYTEST)

bench: build $(STAMPS)/demo
	$(PY) -m benchmarks

build: $(STAMPS)/build

lint: $(STAMPS)/test
	$(VENV)/bin/ruff check $(PYTHON_FILES)
	$(VENV)/bin/ruff format --check $(PYTHON_FILES)
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE_FILES)

format: $(STAMPS)/test
	$(VENV)/bin/ruff check --fix $(PYTHON_FILES)
	$(VENV)/bin/ruff format $(PYTHON_FILES)
	$(VENV)/bin/clang-format -i $(NATIVE_FILES)

CMAKE := $(VENV)/bin/cmake
CMAKE_OPTIONS := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DCMAKE_BUILD_TYPE=Release

# The C++ tests of the CPU kernels link the objects of the Python package; under sanitizers they compile their own.
CONFIGURE = torch=$$($(PY) -c 'import torch; print(torch.__path__[0])'); \
	objects=$$($(PY) -c 'import sys, torch; print(f"torch-{torch.__version__}-{sys.implementation.cache_tag}/natrpb._C")'); \
	$(CMAKE) -S . -B build/cmake $(CMAKE_OPTIONS) -DNATRPB_CPU_OBJECTS="$(CURDIR)/build/$$objects" -DNATRPB_EMULATOR=ON \
	         -DNATRPB_TORCH="$$torch" -DNATRPB_CUDA_INCLUDE=$(CUDA_TO_TEST)/include

cpp-test: build $(STAMPS)/test $(TOOLKIT_STAMP)
	$(CONFIGURE)
	$(CMAKE) --build build/cmake
	$(VENV)/bin/ctest --test-dir build/cmake --output-on-failure -j 2
	$(CMAKE) -S . -B build/cmake-sanitize $(CMAKE_OPTIONS) -DNATRPB_TILE_TWIN=ON -DNATRPB_SANITIZE=address,undefined
	$(CMAKE) --build build/cmake-sanitize
	$(VENV)/bin/ctest --test-dir build/cmake-sanitize --output-on-failure -j 2

# The kernels of the C++ library for aarch64, cross-compiled and run by QEMU.
arm-check: $(STAMPS)/test
	$(CMAKE) -S . -B build/cmake-aarch64 $(CMAKE_OPTIONS) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	         -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ '-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu'
	$(CMAKE) --build build/cmake-aarch64
	$(VENV)/bin/ctest --test-dir build/cmake-aarch64 --output-on-failure -j 2

# The ops on the emulated CUDA kernels.
EMULATED_TESTS := local_attention local_attention_gradients qkvpacked unfused window determinism fuzz binding \
                  l2_normalize irpe_ops irpe_ops_torch irpe_functional irpe_relative
EMULATED_PYTEST := $(PY) -m pytest -n 2 --emulator build/cmake/_C_emulator.so $(EMULATED_TESTS:%=tests/test_%.py)

emulator-test: build $(STAMPS)/test $(TOOLKIT_STAMP)
	$(CONFIGURE)
	$(CMAKE) --build build/cmake --target natrpb_emulated_ops
	$(EMULATED_PYTEST)

# The CUDA kernels for every architecture, and no spill.
test cuda-check: export NATRPB_CUDA := 1
test cuda-check: export CUDA_HOME := $(CUDA_TO_TEST)
test cuda-check: export TORCH_CUDA_ARCH_LIST := $(CUDA_ARCHITECTURES)
test cuda-check: export NVCC_APPEND_FLAGS := -Xptxas=-warn-spills,-Werror

cuda-check: build $(STAMPS)/test
	$(PY) -m pytest tests/test_cuda_build.py

# With PYTHON on the command line that Python runs it as it stands, without $(VENV): all it needs must be installed there.
GPU_PYTHON := $(if $(findstring command line,$(origin PYTHON)),$(PYTHON),$(PY))
PART ?= build tests sanitize bench ncu

gpu-check: $(if $(filter $(PY),$(GPU_PYTHON)),$(STAMPS)/test)
	$(GPU_PYTHON) -m benchmarks.gpu_check $(addprefix --part ,$(PART)) $(GPU_CHECK_FLAGS)

wheel: $(STAMPS)/requirements
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info natrpb/*.so $(STAMPS)/build

# The environment. Torch goes in first and alone, so that nothing else chooses its version.

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"natrpb needs Python >= 3.10, $(PYTHON) is {sys.version}")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/torch-spec: $(STAMPS)/venv FORCE
	@echo '$(TORCH_SPEC)' | cmp -s - $@ || echo '$(TORCH_SPEC)' > $@

$(STAMPS)/torch: $(STAMPS)/torch-spec
	$(PIP) install '$(TORCH_SPEC)'
	touch $@

$(STAMPS)/requirements: $(STAMPS)/torch requirements/build.txt
	$(PIP) install -r requirements/build.txt
	touch $@

$(STAMPS)/demo: $(STAMPS)/requirements requirements/demo.txt
	$(PIP) install -r requirements/demo.txt
	touch $@

# torch 2.x and torchvision 0.(x+15) are released together. Without it the tests that need timm are skipped.
$(STAMPS)/test: $(STAMPS)/requirements requirements/demo.txt requirements/test.txt requirements/test-no-deps.txt
	$(PIP) install -r requirements/test.txt
	$(PIP) install --no-deps -r requirements/test-no-deps.txt
	minor=$$($(PY) -c 'import torch; print(torch.__version__.split(".")[1])'); \
	$(PIP) install --no-deps "torchvision==0.$$((minor + 15)).*" || $(PIP) uninstall -y torchvision
	touch $@

# Beside the environment's own packages, so that torch's CUDA libraries stay as they are.
$(STAMPS)/cuda: $(STAMPS)/venv requirements/cuda.txt
	$(PIP) install --no-deps --upgrade --target $(VENV)/cuda -r requirements/cuda.txt
	touch $@

# What the build takes from its environment.
$(STAMPS)/build-spec: $(STAMPS)/venv FORCE
	@spec="$$CUDA_HOME $$CUDA_PATH $(CUDA_TOOLKIT) $${NATRPB_CUDA:-auto} $$TORCH_CUDA_ARCH_LIST $$NATRPB_BUILD $$NATRPB_DEBUG"; \
	echo "$$spec" | cmp -s - $@ || echo "$$spec" > $@

$(STAMPS)/build: $(STAMPS)/requirements $(STAMPS)/build-spec $(if $(filter test cuda-check,$(MAKECMDGOALS)),$(TOOLKIT_STAMP))
$(STAMPS)/build: setup.py pyproject.toml natrpb/__init__.py csrc/sources.txt $(NATIVE_FILES)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@
