# Every target but gpu works in .venv, which is made on first use with the versions of constraints.txt.
#
#   PYTHON=python3.12          another interpreter for .venv (or for gpu, which uses the machine's own)
#   TORCH_PIP_ARGS=...         extra arguments for installing PyTorch, e.g. to choose a CPU build
#   PYTEST_ARGS=...            extra arguments for pytest, e.g. -k rotary
#   DEVICE=cpu                  make gpu rehearses at small sizes in .venv
#   BUDGET=480, PHASES="tests attention", OUT=build/gpu    make gpu: its seconds, its phases, the folder of what it learns
#   QWEN2VL_COMMIT=...          the commit that results name, on a machine that has the files without their history
#   WHEELS=build/wheels         folder of the wheels that make gpu-wheels fetches and make gpu installs for itself
#   PYTHON_VERSION=3.12         the Python that make gpu-wheels fetches wheels for
#   FUZZ_SECONDS=60, FUZZER=libfuzzer, FUZZ_CXX=..., FUZZ_DIR=...    make fuzz: time a target, engine, compiler, folder
#   TRANSFORMERS="5.6.0 5.24.0", TRANSFORMERS_SRC=...    make test-stacks: versions of transformers; a checkout of the one
#                               that .venv has, whose own tests run stock and switched on (without it those that its
#                               source distribution has)
#   ATTACK_SECONDS=60, ATTACK_SEED=0    make attack: its time, and the seed that its cases come from
#   QWEN2VL_BUILD_CUDA=0|1|auto, QWEN2VL_SM90=0|all|auto, MAX_JOBS, TORCH_CUDA_ARCH_LIST    the build of the extensions, see setup.py

PYTHON ?= python3
PIP := .venv/bin/python -m pip
RUN := .venv/bin/python
CSRC := $(shell find csrc -type f)
FUZZ := $(wildcard tests/fuzz/*.cpp tests/fuzz/*.h)
# What clang-format keeps in order: the extensions, and what no install builds.
FORMATTED := $(CSRC) $(FUZZ) $(shell find tests/kernels/host benchmarks/cuda -type f)

# The versions of Triton that PyTorch's builds for CUDA bring: 2.10 and 2.11, 2.12, 2.13, 2.14.
TRITONS := 3.6.0 3.7.0 3.7.1 3.8.0

.PHONY: help install demo check test test-long aot sm90-cubins lint format dist fuzz attack gpu gpu-wheels hub test-stacks test-transformers test-trainers \
	signatures test-oldest resolve clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    the small trained model reads, compares, points, follows videos and plays, beside the truth"
	@echo "make check   a checkpoint with random weights here and in transformers: logits and greedy tokens compared"
	@echo "make test    the test suite, at its end the files that take the most CPU time"
	@echo "make test-long    before a release: what is too slow for each commit, then fuzz, attack (an hour), test-oldest and test-stacks"
	@echo "make aot     every Triton kernel compiled for every GPU with every compiler that PyTorch brings, and its gates;"
	@echo "             attention for Hopper by three versions of ptxas;  make sm90-cubins  keeps what the tuner tries"
	@echo "make lint    ruff, pyright, clang-format;  make format  rewrites what they can"
	@echo "make dist    the sdist and the wheel in build/dist, checked, installed into an empty environment and asked there"
	@echo "make fuzz    the C++ of the CPU on random input, under the address and undefined behaviour sanitizers"
	@echo "make attack  damaged files, messages and archives for ATTACK_SECONDS=60, and what became of them"
	@echo "make gpu     on a machine with a GPU: build, test, measure and tune within BUDGET=480 seconds, with its own"
	@echo "             python3, no network;  make gpu DEVICE=cpu  rehearses it at small sizes;  QWEN2VL_COMMIT=...  is the"
	@echo "             commit that results name where there is no .git"
	@echo "make gpu-wheels    wheels of what benchmarks compare with, for a machine without a network, in build/wheels"
	@echo "make test-stacks    vLLM's and SGLang's own towers, lmms-eval, every version of transformers (test-transformers), TRL, ms-swift"
	@echo "             and LLaMA-Factory (test-trainers), patched and stock, each in an environment"
	@echo "make test-oldest    the test suite with the lowest versions that pyproject.toml names, in an environment of their own"
	@echo "make resolve    shows that every Python of README finds all versions: the newest, the lowest and the pinned"
	@echo "make hub     the ops and layers as a project of the kernels hub, in build/hub"
	@echo "make clean   remove .venv and everything that was built"

# PyTorch goes first and alone: a build of the pinned version that is already there is kept by all that follows.
.venv/torch.stamp: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt $(TORCH_PIP_ARGS) torch
	@touch $@

# Editable, so that the tests run against the tree; again when something compiled has changed.
.venv/install.stamp: .venv/torch.stamp pyproject.toml setup.py $(CSRC)
	@echo "installing qwen2vl and its tools, building the extensions ..."
	@$(PIP) install --quiet -c constraints.txt -e ".[all]"
	@touch $@

install: .venv/install.stamp

demo: .venv/install.stamp
	@$(RUN) -m examples.demo

check: .venv/install.stamp
	@$(RUN) -m examples.demo --check

# Another version of Triton beside that of .venv, for its compiler: most people's GPU runs what that one makes.
build/triton/%: | .venv/torch.stamp
	@echo "installing Triton $*, for its compiler ..."
	@rm -rf $@.part && $(PIP) install --quiet --no-deps --target $@.part triton==$* && mv $@.part $@

# And another ptxas beside nvcc's and those that Triton brings.
build/ptxas/%: | .venv/torch.stamp
	@echo "installing ptxas $* ..."
	@rm -rf $@.part && $(PIP) install --quiet --no-deps --target $@.part "nvidia-cuda-nvcc-cu12==$*.*" && mv $@.part $@

# CuTe's headers, which layouts in shared memory are held to, without what the package has besides.
build/cutlass/%: | .venv/torch.stamp
	@echo "installing the headers of CUTLASS $* ..."
	@rm -rf $@.part && $(PIP) install --quiet --no-deps --target $@.part nvidia-cutlass==$* && mv $@.part $@

aot: .venv/install.stamp $(addprefix build/triton/,$(TRITONS)) build/ptxas/12.9
	$(RUN) -m benchmarks aot --failures
	$(RUN) -m benchmarks aot --failures $(addprefix --triton ,$(TRITONS))
	$(RUN) -m benchmarks sm90 --tried --failures

# What the tuner tries on Hopper, compiled here for a machine whose Python or nvcc is another.
sm90-cubins: .venv/install.stamp
	$(RUN) -m benchmarks sm90 --tried --failures --ptxas nvcc --cubins build/sm90

# One worker a core and one thread a worker: threads of several workers would spin against each other.
# Each worker has a stretch of files and takes from the others' when it is done, so that most modules have their
# fixtures, models and processes of compilers once.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist worksteal
test: .venv/install.stamp | build/triton/3.6.0 build/cutlass/4.2.0.0
	@$(PYTEST) -m "not long" $(PYTEST_ARGS)

# What repeats at a larger size what make test shows, then what needs minutes, other versions or other stacks.
test-long: .venv/install.stamp
	@$(PYTEST) -m long $(PYTEST_ARGS)
	@$(MAKE) fuzz FUZZ_SECONDS=20
	@$(MAKE) attack ATTACK_SECONDS=3600
	@$(MAKE) test-oldest PYTEST_ARGS=
	@$(MAKE) test-stacks

lint: .venv/install.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath $(RUN)
	.venv/bin/clang-format --dry-run -Werror $(FORMATTED)

format: .venv/install.stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(FORMATTED)

# The wheel is built from the sdist, so that the sdist has all it takes. It is for this machine alone, as its tag says:
# what goes to PyPI is the sdist.
build/twine/bin/twine: constraints.txt
	$(PYTHON) -m venv --clear build/twine
	build/twine/bin/python -m pip install --quiet "twine>=6.1"
	@touch $@

dist: .venv/install.stamp build/twine/bin/twine
	@rm -rf build/dist
	@$(RUN) -m build --outdir build/dist . > build/dist.log || { tail -30 build/dist.log; exit 1; }
	build/twine/bin/twine check --strict build/dist/*
	@$(RUN) -m tests.distribution build/dist

# Without libFuzzer the targets have a main of their own, which knows nothing of coverage but needs no clang.
FUZZ_SECONDS ?= 60
FUZZ_DIR ?= build/fuzz$(addprefix -,$(FUZZER))
FUZZ_CXX ?= $(if $(filter libfuzzer,$(FUZZER)),clang++,c++)
FUZZ_FLAGS = -std=c++17 -O1 -g -fno-sanitize-recover=all -ffp-contract=off -pthread -Icsrc \
	$(if $(filter libfuzzer,$(FUZZER)),-fsanitize=fuzzer$(,)address$(,)undefined -DQWEN2VL_LIBFUZZER,-fsanitize=address$(,)undefined)
FUZZ_WITH_decoder_step = $(wildcard csrc/cpu/few_rows*.cpp) csrc/cpu/workers.cpp
FUZZ_WITH_image_to_patches = $(wildcard csrc/cpu/resample*.cpp)
FUZZ_WITH_quant_linear = csrc/cpu/quant_linear_x86.cpp csrc/cpu/workers.cpp
FUZZ_TARGETS = $(addprefix $(FUZZ_DIR)/,decoder_step image_to_patches mrope_positions quant_linear)
, := ,

$(FUZZ_DIR)/%: tests/fuzz/%.cpp $(CSRC) $(FUZZ)
	@mkdir -p $(FUZZ_DIR)
	$(FUZZ_CXX) $(FUZZ_FLAGS) $< csrc/cpu/$*.cpp $(FUZZ_WITH_$*) -o $@

fuzz: $(FUZZ_TARGETS)
	@for target in $^; do \
		echo "$$target for $(FUZZ_SECONDS) s"; \
		$$target -max_total_time=$(FUZZ_SECONDS) $(if $(filter libfuzzer,$(FUZZER)),-len_control=0 -max_len=320) -artifact_prefix=$$target- || exit 1; \
	done

# Damaged files, messages of any shape and forged archives; a line names the seed of each that is answered badly.
ATTACK_SECONDS ?= 60
ATTACK_SEED ?= 0
attack: .venv/install.stamp
	@OMP_NUM_THREADS=1 $(RUN) -m tests.attack --seconds $(ATTACK_SECONDS) --seed $(ATTACK_SEED)

# Phases under one budget, the most telling first; see benchmarks/gpu/. What does not fit is named in the end. Its last
# line of each part is printed, and $(OUT)/logs.tgz holds logs and results after each, whatever ends it.
DEVICE ?= cuda
BUDGET ?= 480
OUT ?= build/gpu
WHEELS ?= build/wheels

gpu: export QWEN2VL_COMMIT := $(QWEN2VL_COMMIT)
gpu: $(if $(filter cpu,$(DEVICE)),.venv/install.stamp)
	$(if $(filter cpu,$(DEVICE)),$(RUN),$(PYTHON)) -m benchmarks gpu --device $(DEVICE) --budget $(BUDGET) \
		--out $(OUT) --wheels $(WHEELS) $(addprefix --only ,$(PHASES))

# For a machine with a GPU, which may have no network and may be sent 64 MiB at a time: two sets, each in a folder.
PYTHON_VERSION ?= 3.12
WHEEL_SETS = peers flash-attn-4
WHEEL_PLATFORMS = $(foreach tag,manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014,--platform $(tag)_x86_64)

gpu-wheels:
	@for set in $(WHEEL_SETS); do \
		folder=$(WHEELS)/$$set; rm -rf $$folder; \
		$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --implementation cp $(WHEEL_PLATFORMS) \
			--python-version $(PYTHON_VERSION) --dest $$folder --requirement benchmarks/wheels/$$set.txt \
			|| { echo "benchmarks/wheels/$$set.txt: not all of it was found for Python $(PYTHON_VERSION)" >&2; exit 1; }; \
		for wheel in $$folder/*.whl; do echo "$$(du -k $$wheel | cut -f1) KiB $$wheel"; done; \
		size=$$(cat $$folder/*.whl | wc -c); \
		echo "$$((size >> 20)) MiB in $$folder"; \
		[ $$size -le $$((64 << 20)) ] || echo "warning: $$folder is larger than 64 MiB and travels in parts" >&2; \
	done

# Other stacks in environments of their own, some GB each, on the CPU. build/stacks is kept between runs.
STACK_TORCH ?= torch==2.13.0

build/stacks/%/torch.stamp:
	$(PYTHON) -m venv build/stacks/$*
	build/stacks/$*/bin/python -m pip install --quiet $(TORCH_PIP_ARGS) $(STACK_TORCH)
	@touch $@

build/stacks/vllm/install.stamp build/stacks/sglang/install.stamp: build/stacks/%/install.stamp: \
		build/stacks/%/torch.stamp tests/stacks/%.txt tests/stacks/%-no-deps.txt
	build/stacks/$*/bin/python -m pip install --quiet $(STACK_TORCH) -r tests/stacks/$*.txt
	build/stacks/$*/bin/python -m pip install --quiet --no-deps -r tests/stacks/$*-no-deps.txt
	@touch $@

# Environments that borrow all of .venv but what a stack wants in another version, PyTorch in particular. pip finds what
# is borrowed there, and installs the rest.
PURELIB = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
BORROW = $(RUN) -m venv --without-pip --clear $(1) && \
	echo $(call PURELIB,.venv) > $(call PURELIB,$(1))/borrowed.pth

# The versions of transformers whose parameters a committed file has: the last of each minor, and the one that
# LLaMA-Factory holds. make signatures TRANSFORMERS="..." writes that file for other versions.
SIGNATURES := tests/integrations/transformers_signatures.json
TRANSFORMERS ?= $(shell $(PYTHON) -c 'import json; print(*json.load(open("$(SIGNATURES)"))["versions"])')

build/stacks/transformers-%/install.stamp: .venv/install.stamp
	$(call BORROW,build/stacks/transformers-$*)
	build/stacks/transformers-$*/bin/python -m pip install --quiet transformers==$*
	@touch $@

build/transformers/%: | .venv/torch.stamp
	@rm -rf $@.part && $(PIP) install --quiet --no-deps --target $@.part transformers==$* && mv $@.part $@

signatures: .venv/install.stamp $(addprefix build/transformers/,$(TRANSFORMERS))
	$(RUN) -m tests.stacks.transformers_signatures $(addprefix build/transformers/,$(TRANSFORMERS))

# Its requirements bring torchvision, of which there is no build for the CPU; nothing that runs here asks for it.
build/stacks/lmms_eval/install.stamp: .venv/install.stamp tests/stacks/lmms_eval.txt
	$(call BORROW,build/stacks/lmms_eval)
	build/stacks/lmms_eval/bin/python -m pip install --quiet -r tests/stacks/lmms_eval.txt \
		$$($(RUN) -c 'import torch; print(f"torch=={torch.__version__}")')
	build/stacks/lmms_eval/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

test-stacks: $(foreach stack,vllm sglang lmms_eval,build/stacks/$(stack)/install.stamp) test-transformers test-trainers
	PYTHONPATH=. build/stacks/vllm/bin/python -m tests.stacks.vllm_tower
	PYTHONPATH=. build/stacks/sglang/bin/python -m tests.stacks.sglang_tower
	PYTHONPATH=. build/stacks/lmms_eval/bin/python -m tests.stacks.lmms_eval_tasks
	$(RUN) -m tests.stacks.transformers_own

# Trainers that people use, each with the versions that it wants, and the line that Python runs as it starts.
TRAINERS = trl swift llamafactory

$(foreach name,$(TRAINERS),build/stacks/$(name)/install.stamp): build/stacks/%/install.stamp: .venv/install.stamp \
		tests/stacks/%.txt
	$(call BORROW,build/stacks/$*)
	build/stacks/$*/bin/python -m pip install --quiet -r tests/stacks/$*.txt \
		$$($(RUN) -c 'import torch; print(f"torch=={torch.__version__}")')
	$(RUN) setup.py --quiet build_pth --build-lib $(call PURELIB,build/stacks/$*)
	@touch $@

test-trainers: $(foreach name,$(TRAINERS),build/stacks/$(name)/install.stamp)
	PYTHONPATH=. build/stacks/trl/bin/python -m tests.stacks.trainers trl-sft
	PYTHONPATH=. build/stacks/trl/bin/python -m tests.stacks.trainers trl-grpo
	PYTHONPATH=. build/stacks/swift/bin/python -m tests.stacks.trainers swift
	PYTHONPATH=. build/stacks/llamafactory/bin/python -m tests.stacks.trainers llamafactory

# Whole models of every version, patched and stock, and with the first what people do to them and the tests that its
# source distribution has; a version that fails does not hide the next.
ADAPTER_TESTS = $(filter-out %_matrix.py %_own.py,$(wildcard tests/integrations/test_transformers*.py))
test-transformers: $(foreach version,$(TRANSFORMERS),build/stacks/transformers-$(version)/install.stamp)
	@failed=; for version in $(TRANSFORMERS); do \
		echo "transformers $$version"; \
		OMP_NUM_THREADS=1 build/stacks/transformers-$$version/bin/python -m pytest -q -n auto -p no:cacheprovider \
			-m "not long" $(PYTEST_ARGS) $(ADAPTER_TESTS) || failed="$$failed $$version"; \
	done; \
	version=$(firstword $(TRANSFORMERS)); \
	OMP_NUM_THREADS=1 build/stacks/transformers-$$version/bin/python -m pytest -q -n auto -p no:cacheprovider \
		-m "not long" $(PYTEST_ARGS) tests/integrations/test_transformers_matrix.py || failed="$$failed $$version"; \
	OMP_NUM_THREADS=1 TRANSFORMERS_SRC= PYTHONPATH=. build/stacks/transformers-$$version/bin/python \
		-m tests.stacks.transformers_own || failed="$$failed $$version"; \
	[ -z "$$failed" ] || { echo "failed with transformers$$failed" >&2; exit 1; }

# uv alone can take the lowest versions. It knows neither pip's configuration nor its cache.
UV := build/uv/bin/uv

$(UV): constraints.txt
	$(PYTHON) -m venv --clear build/uv
	build/uv/bin/python -m pip install --quiet -c constraints.txt uv
	@touch $@

# Two environments, some 3 GB to fetch, with PyTorch for CUDA as it has no other on PyPI; kept between runs. The first has
# the lowest of everything, as far as transformers lets it. What transformers bounds further is the lowest in the second,
# which is without, and has the pinned NumPy: Triton's oldest interpreter is older than it.
OLDEST_INSTALL = $(UV) pip install --python build/oldest/$*/bin/python --only-binary :all: --resolution lowest-direct
build/oldest/full/install.stamp: EXTRAS = --all-extras
build/oldest/full/install.stamp: BUILD = --no-build-isolation -e .
build/oldest/bare/install.stamp: BUILD = .
build/oldest/bare/install.stamp: EXTRAS = --extra video --extra inspect "pytest>=8" "pytest-xdist>=3.5" "hypothesis>=6.115" "psutil>=5.9.4" \
	$(shell grep ^numpy== constraints.txt)
OLDEST_PYTEST = OMP_NUM_THREADS=1 build/oldest/$(1)/bin/python -m pytest -q -rfEs -n auto $(PYTEST_ARGS)

build/oldest/full/install.stamp build/oldest/bare/install.stamp: build/oldest/%/install.stamp: $(UV) pyproject.toml setup.py $(CSRC)
	$(PYTHON) -m venv --clear build/oldest/$*
	$(OLDEST_INSTALL) -r pyproject.toml $(EXTRAS)
	$(UV) pip install --python build/oldest/$*/bin/python --no-deps $(BUILD)
	@touch $@

test-oldest: build/oldest/full/install.stamp build/oldest/bare/install.stamp
	$(call OLDEST_PYTEST,full)
	$(call OLDEST_PYTEST,bare) tests/kernels/triton/test_norms.py tests/examples/test_demo.py tests/examples/test_tokenizer.py \
		$$(grep -LE '^(import|from) (transformers|tests.model import oracle)' \
			$(foreach room,media prompt agents model samples,tests/$(room)/test_*.py))

resolve: $(UV)
	@for python in 3.11 3.12 3.13 3.14; do \
		for how in "--resolution highest" "--resolution lowest-direct" "--constraints constraints.txt"; do \
			echo "Python $$python, $$how"; \
			UV_PYTHON_DOWNLOADS=never $(UV) pip compile --quiet --python-version $$python --python-platform linux \
				--only-binary :all: $$how --all-extras pyproject.toml > /dev/null || exit 1; \
		done; \
	done

# The project for kernel-builder, which builds and uploads it.
hub:
	rm -rf build/hub
	mkdir -p build
	$(PYTHON) hub/assemble.py build/hub

clean:
	rm -rf .venv build dist demo_output *.egg-info qwen2vl_kernels/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
