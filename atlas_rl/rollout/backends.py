"""Chooses the backend of a policy, and the static speculator that it can have there. vLLM is imported only if asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from atlas_rl.config import EngineConfig
from atlas_rl.decode.generate import Backend, InProcessBackend
from atlas_rl.sampling.verification import VERIFIERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atlas_rl.speculators.base import Speculator


def new_backend(model: Any, config: EngineConfig) -> Backend:
    """The backend of a loaded causal LM (in process), of a `vllm.LLM`, or of a checkpoint that vLLM is to load.

    Raises:
        ValueError: The policy cannot be run that way; says what to change.
    """
    if isinstance(model, Backend):
        return model
    if isinstance(model, nn.Module):
        return InProcessBackend(model, VERIFIERS[config.verification](), config.max_batch_size)
    from atlas_rl.vllm.backend import VllmBackend, build_llm

    if config.backend == "in_process":
        raise ValueError(f"the in-process backend takes a loaded causal LM, got {type(model).__name__}")
    if isinstance(model, str | Path):
        model = build_llm(model, vllm_draft_folder(config))
    return VllmBackend(model)


def vllm_draft_folder(config: EngineConfig) -> str | Path | None:
    """Folder of the static head for vLLM, which must know of it before it loads the policy."""
    if isinstance(config.draft_model, nn.Module) or config.draft_model == "fp4":
        raise ValueError("with vLLM draft_model is the folder of an EAGLE-3 head, nothing else")
    return config.draft_model


def static_speculator(
    model: nn.Module | str | Path, backend: Backend, tokenizer: PreTrainedTokenizerBase | None
) -> Speculator:
    """The static speculator: the four-bit self-draft by name, an EAGLE-3 head where the folder holds one, else a draft LM.

    Raises:
        ValueError: The backend cannot draft with it.
    """
    from atlas_rl.speculators.draft_lm import DraftLM, load_draft_model
    from atlas_rl.speculators.eagle3.checkpoint import is_eagle3
    from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
    from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator

    if model == "fp4" and "fp4" in backend.static_kinds:
        return Fp4SelfSpeculator()
    if not isinstance(model, nn.Module) and is_eagle3(model):
        return Eagle3Speculator(model)
    if "draft_lm" not in backend.static_kinds:
        raise ValueError(f"with vLLM draft_model is the folder of an EAGLE-3 head; '{model}' is none")
    if isinstance(model, nn.Module):
        return DraftLM(model, backend.vocab_size)
    policy = backend.view
    loaded = load_draft_model(Path(model), tokenizer, device=policy.device, dtype=policy.dtype)
    return DraftLM(loaded, backend.vocab_size)
