"""Every internal of vLLM that this library touches, in one place, for the versions it knows.

What is here and why:

    version   a vLLM whose internals are not known is refused: silently different ones would cost correctness, not speed
    repairs   the CPU backend of vLLM 0.32 samples wrongly under every speculative method (docs/upstream/), and its start
              trips over llvmlite
    runner    hooks on the model runner: our sampler in place of vLLM's, timers, hidden states for the drafter
    sampler   vLLM's own processing of logits, without its drawing
    engine    the embeddings of a loaded model, as drafters read them; new weights; the proposer of an engine in this process

Before adding a version, run tests/vllm/test_exactness.py on it. vLLM is imported inside functions only.
"""

from atlas_rl.vllm.internals.engine import (
    VllmView,
    abandon,
    drafter_of,
    reload_weights,
    runner_of,
    tensor_parallel,
)
from atlas_rl.vllm.internals.repairs import repair_cpu_sampler, tolerate_numba
from atlas_rl.vllm.internals.runner import Batch, Forward, Hooks, Request, install
from atlas_rl.vllm.internals.version import KNOWN_VERSIONS, check_version, installed_version

__all__ = [
    "KNOWN_VERSIONS",
    "Batch",
    "Forward",
    "Hooks",
    "Request",
    "VllmView",
    "abandon",
    "check_version",
    "drafter_of",
    "install",
    "installed_version",
    "reload_weights",
    "repair_cpu_sampler",
    "runner_of",
    "tensor_parallel",
    "tolerate_numba",
]
