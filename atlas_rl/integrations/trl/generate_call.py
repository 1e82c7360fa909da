"""Reads a trainer's call of `model.generate`, and answers it as transformers would.

A call is served only if the engine supports all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from atlas_rl.checks import empty, shown
from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl.sampling import TrainerSampling, read_generation_config, with_suppressed
from atlas_rl.policy.unwrap import unwrap_policy

_OUTPUTS = ("output_attentions", "output_hidden_states", "output_logits", "output_scores")
_OF_THE_LOOP = frozenset(
    {"synced_gpus", "tokenizer", "assistant_tokenizer", "output_attentions", "output_hidden_states"}
)
"""Arguments that change no token: how ranks wait for each other, what stop strings are read with, what is returned."""


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One call of `model.generate` that the engine can serve.

    Attributes:
        input_ids: The padded prompts, int64 `[prompts, width]`.
        prompts: Token ids of each request, without padding; a prompt is repeated for each of its completions.
        params: Sampling parameters; the caller sets the seed.
        pad_token_id: Fills rows after the end of their completions.
        as_dict: Whether to return transformers' output object instead of the tokens alone.
    """

    input_ids: torch.Tensor
    prompts: list[list[int]]
    params: SamplingParams
    pad_token_id: int
    as_dict: bool

    def answer(self, completions: Sequence[Sequence[int]]) -> Any:
        """The return value of `model.generate`: prompts with completions, padded on the right to the longest."""
        width = max(map(len, completions))
        rows = [[*tokens, *[self.pad_token_id] * (width - len(tokens))] for tokens in completions]
        inputs = self.input_ids.repeat_interleave(len(self.prompts) // len(self.input_ids), dim=0)
        sequences: Any = torch.cat([inputs, torch.tensor(rows, dtype=inputs.dtype, device=inputs.device)], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if self.as_dict else sequences


def read_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GenerateCall:
    """Read the arguments of `model.generate(*args, **kwargs)`.

    Raises:
        ValueError: The engine does not support the call. The message gives the reason, to be read after "because".
    """
    named = _named(args, kwargs)
    inputs = named.pop("inputs", None)
    input_ids, mask = named.pop("input_ids", inputs), named.pop("attention_mask", None)
    if inputs is not None and input_ids is not inputs:
        raise ValueError("it has both inputs and input_ids")
    config, others = _config_of(model, named.pop("generation_config", None), named)
    unknown = sorted(name for name, value in others.items() if value is not None and not empty(value))
    if unknown:
        raise ValueError(f"it has {', '.join(unknown)}")
    wanted = [name for name in _OUTPUTS if config.return_dict_in_generate and getattr(config, name, None)]
    if wanted:
        raise ValueError(f"it asks for {', '.join(wanted)}")
    sampling = _honoured(with_suppressed(read_generation_config(config)))
    times = int(config.num_return_sequences or 1)
    prompts = _prompts(input_ids, mask, config)
    ending = sampling.eos_token_ids[:1] or (0,)
    return GenerateCall(
        input_ids=input_ids,
        prompts=[prompt for prompt in prompts for _ in range(times)],
        params=sampling,
        pad_token_id=ending[0] if config.pad_token_id is None else int(config.pad_token_id),
        as_dict=bool(config.return_dict_in_generate),
    )


def read_sampling(model: nn.Module, config: GenerationConfig) -> SamplingParams:
    """The sampling options of calls with this configuration. Raises `ValueError` for unsupported ones."""
    return _honoured(with_suppressed(read_generation_config(_config_of(model, config, {})[0])))


def check_generate(model: nn.Module) -> None:
    """Raise `ValueError` for a policy with its own `generate`, which may differ from transformers'."""
    inside: Any = unwrap_policy(model)
    replaced = [each for each in (model, inside) if "generate" in vars(each)]
    if replaced or getattr(type(inside), "generate", None) is not GenerationMixin.generate:
        name = type(replaced[0] if replaced else inside).__name__
        raise ValueError(
            f"the policy ({name}) has a generate of its own, which the engine would replace: what it does would be lost"
        )


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _config_of(
    model: nn.Module, config: GenerationConfig | None, named: Mapping[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The configuration that transformers makes of the call, the policy and its defaults; and the other arguments.

    Transformers recognises its options as arguments of `generate`; the arguments that it leaves are the others.
    """
    inside: Any = unwrap_policy(model)
    own = vars(model).get("generation_config")
    if own is not None:
        inside.generation_config = own  # as PEFT does in every call
    # transformers itself decides which of the three takes precedence.
    complete, others = inside._prepare_generation_config(config, **named)
    return complete, {name: value for name, value in others.items() if name not in _OF_THE_LOOP}


def _honoured(sampling: TrainerSampling) -> SamplingParams:
    if sampling.extra:
        entries = ", ".join(f"{name}={shown(value)}" for name, value in sorted(sampling.extra.items()))
        raise ValueError(f"its generation_config has {entries}")
    return sampling.params


def _prompts(input_ids: Any, mask: Any, config: GenerationConfig) -> list[list[int]]:
    """The token ids of each prompt, without left padding."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError("its prompts are not a table of token ids")
    if mask is None:
        mask = _inferred_mask(input_ids, config)
    if (
        not isinstance(mask, torch.Tensor)
        or mask.shape != input_ids.shape
        or not bool(((mask == 0) | (mask == 1)).all())
    ):
        raise ValueError("its attention_mask is no table of zeros and ones beside the prompts")
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1:].all()):
        raise ValueError("its prompts are padded within or on the right")
    lengths = mask.sum(dim=1).tolist()
    if not all(lengths):
        raise ValueError("a prompt is empty")
    return [row[len(row) - int(length) :] for row, length in zip(input_ids.tolist(), lengths, strict=True)]


def _inferred_mask(input_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """The mask that transformers infers if none is given: padding is recognised unless it is also an ending token."""
    pad, endings = config.pad_token_id, config.eos_token_id
    endings = endings if isinstance(endings, list | tuple) else [endings]
    if pad is None or pad in endings:
        return torch.ones_like(input_ids)
    return input_ids.ne(pad).long()
