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
    if not hasattr(model, "llm_engine"):
        raise ValueError(
            "model must be a loaded causal LM, a vllm.LLM, or the folder or name of a checkpoint that vLLM is to load, got "
            f"{type(model).__name__}"
        )
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
        ValueError: The backend cannot draft with it; says what the folder holds, and what to give instead.
    """
    from atlas_rl.speculators.draft_lm import DraftLM, load_draft_model, shares_tokenizer
    from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
    from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
    from atlas_rl.speculators.identify import CAUSAL_LM, EAGLE3, kind_of

    serves_lms = "draft_lm" in backend.static_kinds
    wanted = "the folder of an EAGLE-3 head" + (" or of a causal LM with the policy's tokenizer" if serves_lms else "")
    if model == "fp4" and "fp4" in backend.static_kinds:
        return Fp4SelfSpeculator()
    if isinstance(model, nn.Module):
        if not serves_lms:
            raise ValueError(f"with vLLM draft_model is {wanted}, got {type(model).__name__}")
        return DraftLM(model, backend.vocab_size)
    if not isinstance(model, str | Path):
        raise ValueError(f"draft_model must be {wanted}, got {type(model).__name__}")
    try:
        kind = kind_of(model)
    except ValueError as error:
        raise ValueError(f"draft_model: {error}; a four-bit copy of the policy itself is draft_model='fp4'") from error
    if kind == EAGLE3:
        return Eagle3Speculator(model)
    if kind != CAUSAL_LM or not serves_lms:
        raise ValueError(f"draft_model: '{model}' holds {kind}, which cannot draft here: give {wanted}")
    folder, policy = Path(model), backend.view
    same_tokenizer = shares_tokenizer(folder, tokenizer)
    loaded = load_draft_model(folder, device=policy.device, dtype=policy.dtype)
    return DraftLM(loaded, backend.vocab_size, same_tokenizer=same_tokenizer)
