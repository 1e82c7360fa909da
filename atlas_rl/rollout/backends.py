"""Which backend runs a policy, and what can be its static arm there. vLLM is imported only where it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from torch import nn

from atlas_rl.config import EngineConfig
from atlas_rl.policy.in_process import InProcessBackend, unwrap_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atlas_rl.speculators.base import Speculator
    from atlas_rl.vllm.backend import VllmBackend

AnyBackend: TypeAlias = Union[InProcessBackend, "VllmBackend"]


def runs(backend: AnyBackend, model: Any) -> bool:
    """Whether a backend runs this policy."""
    if isinstance(backend, InProcessBackend):
        return backend.model is unwrap_policy(model)
    return backend is model or backend.llm is model or isinstance(model, str | Path)


def new_backend(model: Any, config: EngineConfig) -> AnyBackend:
    """The backend of a loaded causal LM (in process), of a `vllm.LLM`, or of a checkpoint that vLLM is to load.

    Raises:
        ValueError: The policy cannot be run that way; says what to change.
    """
    if isinstance(model, nn.Module):
        return InProcessBackend(model)
    from atlas_rl.vllm.backend import VllmBackend, build_llm

    if isinstance(model, VllmBackend):
        return model
    if config.backend == "in_process":
        raise ValueError(f"the in-process backend takes a loaded causal LM, got {type(model).__name__}")
    if isinstance(model, str | Path):
        model = build_llm(model, vllm_draft_folder(config))
    return VllmBackend(model)


def vllm_draft_folder(config: EngineConfig) -> str | Path | None:
    """The static arm for vLLM, which must know of it before it loads the policy."""
    if isinstance(config.draft_model, nn.Module) or config.draft_model == "fp4":
        raise ValueError("with vLLM draft_model is the folder of an EAGLE-3 head, nothing else")
    return config.draft_model


def static_arm(
    model: nn.Module | str | Path, backend: AnyBackend, tokenizer: PreTrainedTokenizerBase | None
) -> Speculator:
    """The static arm: the four-bit self-draft by name, an EAGLE-3 head where the folder holds one, else a draft LM."""
    from atlas_rl.speculators.draft_lm import DraftLM, load_draft_model
    from atlas_rl.speculators.eagle3.checkpoint import is_eagle3
    from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
    from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator

    if model == "fp4" and isinstance(backend, InProcessBackend):
        return Fp4SelfSpeculator()
    if not isinstance(model, nn.Module) and is_eagle3(model):
        return Eagle3Speculator(model)
    if not isinstance(backend, InProcessBackend):
        raise ValueError(f"with vLLM draft_model is the folder of an EAGLE-3 head; '{model}' is none")
    if isinstance(model, nn.Module):
        return DraftLM(model, backend.vocab_size)
    return DraftLM(load_draft_model(Path(model), tokenizer, like=backend.model), backend.vocab_size)
