"""All uses of vLLM's internals, for the supported versions.

Modules, and why each exists:

    version   refuses a vLLM whose internals are unknown: unnoticed differences would cost correctness, not speed
    repairs   vLLM's CPU backend samples wrongly under every speculative method (docs/upstream/), and llvmlite makes
              its start fail
    runner    hooks on the model runner: our sampler in place of vLLM's, timers, hidden states for the drafter
    sampler   vLLM's own processing of logits, without its drawing
    engine    the embeddings of a loaded model, as drafters read them; an engine's proposer, ranks and prefix cache
    weights   new weights, all or nothing
    hybrids   refuses policies whose recurrent states vLLM does not roll back exactly
    idle      where a worker waits for work, and the drafter may learn
    adapters  LoRA adapters that are loaded into a running engine
    transfer  our weight-transfer backends, which notify drafters of a new policy (`transfer_engines`)

Where versions differ, a module here asks `since("0.28")` or uses what vLLM passes; code outside this package does not
depend on the version. Before adding a version, run `make test-vllm VLLM=...`. vLLM is imported inside functions only.
"""

from atlas_rl.vllm.internals.adapters import follow_adapters
from atlas_rl.vllm.internals.engine import (
    VllmView,
    abandon,
    agree,
    drafter_of,
    in_engine_process,
    replica_seed,
    reset_prefix_cache_with_new_weights,
    runner_of,
    tensor_parallel,
)
from atlas_rl.vllm.internals.hybrids import check_hybrid
from atlas_rl.vllm.internals.idle import no_spare_time, study_while_waiting
from atlas_rl.vllm.internals.repairs import repair_cpu_sampler, tolerate_numba
from atlas_rl.vllm.internals.runner import Forward, ForwardBatch, Hooks, install
from atlas_rl.vllm.internals.transfer import follow, register_backends
from atlas_rl.vllm.internals.version import KNOWN_VERSIONS, check_version, installed_version
from atlas_rl.vllm.internals.weights import load_all_or_nothing, reload_weights

__all__ = [
    "KNOWN_VERSIONS",
    "Forward",
    "ForwardBatch",
    "Hooks",
    "VllmView",
    "abandon",
    "agree",
    "check_hybrid",
    "check_version",
    "drafter_of",
    "follow",
    "follow_adapters",
    "in_engine_process",
    "install",
    "installed_version",
    "load_all_or_nothing",
    "no_spare_time",
    "register_backends",
    "reload_weights",
    "repair_cpu_sampler",
    "replica_seed",
    "reset_prefix_cache_with_new_weights",
    "runner_of",
    "study_while_waiting",
    "tensor_parallel",
    "tolerate_numba",
]
