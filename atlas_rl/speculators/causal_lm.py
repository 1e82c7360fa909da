"""Loads a causal LM, or its tokenizer, from a folder; incomplete checkpoints are refused.

transformers fills whatever a checkpoint lacks with random numbers and drops unknown tensors, with only a warning. A
drafter loaded like that drafts badly for the rest of the run, so the loading report is read, and anything missing is an
error.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from atlas_rl import progress
from atlas_rl.speculators.identify import CAUSAL_LM, check_finite, kind_of

_TOKENIZER_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError)
_NAMED = 4  # most tensors that a message names


def causal_lm_config(folder: str | Path) -> Any:
    """Configuration of the causal LM in `folder`; only the names of the weights are read.

    Raises:
        ValueError: The folder holds something else; the message names it as `kind_of` does.
    """
    kind = kind_of(folder)
    if kind != CAUSAL_LM:
        raise ValueError(f"'{folder}' holds {kind}, no causal LM")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(
            f"transformers cannot read the configuration in '{folder}' ({_one_line(error)}): give a causal LM that it knows"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"'{folder}' holds a model of type '{config.model_type}', no causal LM")
    return config


def load_causal_lm(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """The causal LM in `folder`, on the CPU and in evaluation mode.

    Raises:
        ValueError: It is no causal LM, or is damaged, or has weights that are missing, unused or not finite.
    """
    config = causal_lm_config(folder)
    try:
        with progress.loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in our own words
            )
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"the checkpoint in '{folder}' cannot be loaded ({_one_line(error)})") from error
    model, report = loaded
    faults = {
        "missing": report["missing_keys"],
        "of another shape": {entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]},
        "unknown to the model": report["unexpected_keys"],
    }
    found = [f"{_listed(names)} {fault}" for fault, names in faults.items() if names]
    if found:
        raise ValueError(
            f"'{folder}' holds no whole causal LM of type '{config.model_type}': {'; '.join(found)}. Give the folder of a "
            "complete one, as save_pretrained() writes it"
        )
    check_finite(dict(model.named_parameters()), f"the model in '{folder}'")
    return model.eval()


def load_tokenizer(folder: str | Path, option: str = "") -> Any:
    """The tokenizer saved in a folder.

    Args:
        folder: Folder of the tokenizer; names of the hub are not looked up.
        option: Option that named the folder, which begins the error.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # tokenizers raises a bare Exception if it does not understand a tokenizer.json.
        if type(error) is not Exception and not isinstance(error, _TOKENIZER_FAULTS):
            raise
        named = f"{option}: " if option else ""
        raise ValueError(
            f"{named}no tokenizer can be loaded from '{folder}' ({_one_line(error)}): save it there"
        ) from error


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return f"{', '.join(ordered[:_NAMED])}{more} {'is' if len(ordered) == 1 else 'are'}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
