"""Reads a TRL trainer's sampling options, for either engine.

A trainer keeps the common options as attributes of its own and the rest in `generation_kwargs`, which win over attributes
of the same name. Both engines read them here; they differ in the entries of `generation_kwargs` that they can honour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atlas_rl.core import SamplingParams

OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options that every engine has. The trainer itself sets the number of tokens, the ending tokens and the seed."""


@dataclass(frozen=True, slots=True)
class TrainerSampling:
    """How a trainer wants its rollouts sampled.

    Attributes:
        params: The options that every engine has.
        extra: The other entries of `generation_kwargs`, by name. An engine honours them or refuses them.
    """

    params: SamplingParams
    extra: dict[str, Any]


def read_sampling(trainer: Any, seed: int) -> TrainerSampling:
    """The trainer's present sampling options with `seed`. Raises `ValueError` for a value that is out of its range."""
    extra = dict(trainer.args.generation_kwargs or {})
    options = {name: extra.pop(name, getattr(trainer, name)) for name in OPTIONS}
    # Off is 0 here. TRL says None, and for top_k also -1.
    options["top_k"] = max(options["top_k"] or 0, 0)
    options["min_p"] = options["min_p"] or 0.0
    params = SamplingParams(
        max_new_tokens=trainer.max_completion_length,
        eos_token_ids=tuple(trainer.eos_token_ids),
        seed=seed,
        **options,
    )
    return TrainerSampling(params, extra)
