"""Chooses the backend for a policy and its static speculator. vLLM is imported only if needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from atlas_rl.checks import path, shown, wrong
from atlas_rl.config import EngineConfig, mtp_folder
from atlas_rl.decode.generate import Backend, InProcessBackend
from atlas_rl.sampling.verification import VERIFIERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atlas_rl.speculators.base import Speculator


def new_backend(model: Any, config: EngineConfig) -> Backend:
    """The backend for a loaded causal LM (in process), a `vllm.LLM`, or a checkpoint to be loaded by vLLM.

    Raises:
        ValueError: The policy cannot be run that way; the message says what to change.
    """
    if isinstance(model, Backend):
        return model
    if isinstance(model, nn.Module):
        if config.backend == "vllm":
            raise ValueError(
                "backend='vllm' takes a checkpoint's folder or name, or a vllm.LLM, got "
                f"{type(model).__name__}: a loaded model runs in process, with backend='in_process' or 'auto'"
            )
        return InProcessBackend(model, VERIFIERS[config.verification](), config.max_batch_size)
    if isinstance(model, str | Path):
        _check_checkpoint(model, config)
    elif config.backend == "in_process":
        raise ValueError(f"model must be a loaded causal LM in process, got {type(model).__name__} {shown(model)}")
    from atlas_rl.vllm.backend import VllmBackend, build_llm

    if isinstance(model, str | Path):
        try:
            model = build_llm(model, vllm_draft_folder(config))
        except OSError as error:
            if not _not_found(error) or Path(model).exists():
                raise
            raise ValueError(
                f"model={str(model)!r} is neither a folder nor in the hub's cache, and the hub does not give it. A name is "
                f"for vLLM, which loads it; to generate in process give AutoModelForCausalLM.from_pretrained({str(model)!r})"
            ) from error
    if not hasattr(model, "llm_engine"):
        raise ValueError(
            "model must be a loaded causal LM, a vllm.LLM, or the folder or name of a checkpoint that vLLM is to load, got "
            f"{type(model).__name__}"
        )
    return VllmBackend(model)


def _not_found(error: BaseException | None) -> bool:
    """Whether a checkpoint was not found: transformers raises an `OSError` because of the hub's own error."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    while error is not None and not isinstance(error, LocalEntryNotFoundError | RepositoryNotFoundError):
        error = error.__cause__
    return error is not None


def _check_checkpoint(model: str | Path, config: EngineConfig) -> None:
    """Raise `ValueError` for an unusable checkpoint name, before vLLM is loaded."""
    folder = path("model", model, "a loaded causal LM, or for vLLM the folder or name of a checkpoint")
    if config.backend == "in_process":
        raise ValueError(
            f"model must be a loaded causal LM in process, got {shown(model)}: give "
            f"AutoModelForCausalLM.from_pretrained({str(model)!r})"
        )
    names_a_folder = isinstance(model, Path) or model.startswith(("/", ".", "~")) or model.count("/") > 1
    if names_a_folder and not folder.exists():
        raise ValueError(
            f"model={str(model)!r}: no such folder. A path or name of a checkpoint is for vLLM, which loads it; to "
            "generate in process give a loaded causal LM, AutoModelForCausalLM.from_pretrained(...)"
        )


def resized(backend: Backend) -> bool:
    """Whether the policy's embeddings have grown since the backend was made; drafters must then be bound again.

    Raises:
        ValueError: The embeddings have shrunk.
    """
    before, now = backend.vocab_size, backend.current_vocab_size()
    if now < before:
        raise ValueError(
            f"the policy's vocabulary has shrunk from {before} tokens to {now}, and drafters remember tokens that are "
            "gone: make a new engine"
        )
    return now > before


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `ValueError` for a tokenizer without ending tokens, such as a tokenizer's name or a processor."""
    if tokenizer is None or hasattr(tokenizer, "eos_token_id"):
        return
    if hasattr(tokenizer, "tokenizer"):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}: give the one inside, tokenizer=processor.tokenizer"
        )
    raise wrong("tokenizer", "a loaded tokenizer (AutoTokenizer.from_pretrained(...)) or None", tokenizer)


def vllm_draft_folder(config: EngineConfig) -> str | Path | None:
    """Folder of the static head for vLLM, which needs it before it loads the policy."""
    _refuse_mtp(config.draft_model)
    if isinstance(config.draft_model, nn.Module) or config.draft_model == "fp4":
        raise ValueError("with vLLM draft_model is the folder of an EAGLE-3 or DFlash head, nothing else")
    return config.draft_model


def _refuse_mtp(draft_model: Any) -> None:
    """Raise `ValueError` if the policy's MTP layer is requested, which drafts in process only."""
    if mtp_folder(draft_model) is not None:
        raise ValueError(
            f"with vLLM draft_model={draft_model!r} does not draft: give the folder of an EAGLE-3 or DFlash head. vLLM's "
            "own method 'mtp' drafts without this library"
        )


def static_speculator(
    model: nn.Module | str | Path, backend: Backend, tokenizer: PreTrainedTokenizerBase | None
) -> Speculator:
    """The static speculator: four-bit self-draft or MTP layer by name, the head in a folder, else a draft LM.

    Raises:
        ValueError: The backend cannot draft with it; the message says what the folder holds, and what to give instead.
    """
    from atlas_rl.speculators.draft_lm import DraftLM, load_draft_model, shares_tokenizer
    from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
    from atlas_rl.speculators.identify import CAUSAL_LM, DFLASH, DSPARK, EAGLE3, MTP, kind_of
    from atlas_rl.speculators.mtp.speculator import MtpSpeculator
    from atlas_rl.speculators.static_heads import head_speculator

    serves_lms = "draft_lm" in backend.static_kinds
    wanted = "the folder of an EAGLE-3 or DFlash head" + (
        ", or of a causal LM with the policy's tokenizer" if serves_lms else ""
    )
    if model == "fp4" and "fp4" in backend.static_kinds:
        return Fp4SelfSpeculator()
    if "mtp" not in backend.static_kinds:
        _refuse_mtp(model)
    elif (mtp := mtp_folder(model)) is not None:
        return MtpSpeculator(mtp or None)
    if isinstance(model, nn.Module):
        if not serves_lms:
            raise ValueError(f"with vLLM draft_model is {wanted}, got {type(model).__name__}")
        return DraftLM(model, backend.vocab_size)
    if not isinstance(model, str | Path):
        raise ValueError(f"draft_model must be {wanted}, got {type(model).__name__}")
    try:
        kind = kind_of(model)
    except ValueError as error:
        said = str(error).rstrip(".")
        raise ValueError(f"draft_model: {said}. A four-bit copy of the policy itself is draft_model='fp4'") from error
    if kind in (EAGLE3, DFLASH, DSPARK):
        return head_speculator(model)
    if kind == MTP and "mtp" in backend.static_kinds:
        return MtpSpeculator(model)
    if kind != CAUSAL_LM or not serves_lms:
        raise ValueError(f"draft_model: '{model}' holds {kind}, which cannot draft here: give {wanted}")
    folder, policy = Path(model), backend.view
    same_tokenizer = shares_tokenizer(folder, tokenizer)
    loaded = load_draft_model(folder, device=policy.device, dtype=policy.dtype)
    return DraftLM(loaded, backend.vocab_size, same_tokenizer=same_tokenizer)
