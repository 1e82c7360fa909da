"""Tiny vLLM engines for the tests, in this process. Importing this module skips the test module where there is no vLLM."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make setup-vllm", allow_module_level=True)

# One thread, wherever the scheduler puts it: vLLM otherwise binds its threads to cores of its own choice.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from atlas_rl.vllm.backend import in_this_process, llm_arguments

_ALIVE: list[Any] = []  # an engine that is collected takes the process groups of all others with it


def engine(folder: Path, **arguments: Any) -> Any:
    """A `vllm.LLM` in float32 without a tokenizer; by default with our proposer."""
    with in_this_process():
        from vllm import LLM

        defaults: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 32,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "logprobs_mode": "processed_logprobs",
        }
        llm = LLM(model=str(folder), **(defaults | llm_arguments() | arguments))
    _ALIVE.append(llm)
    return llm


def completions(outputs: Any) -> list[list[int]]:
    """The tokens of every sample of every request."""
    return [list(sample.token_ids) for output in outputs for sample in output.outputs]
