"""A trainer's sampling options, read for either engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl.sampling import read_sampling


def trainer(generation_kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
    """What `read_sampling` reads of a trainer, with TRL's defaults."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    return SimpleNamespace(
        max_completion_length=12,
        eos_token_ids=[1, 2],
        args=SimpleNamespace(generation_kwargs=generation_kwargs),
        **(defaults | options),
    )


def test_a_trainers_options_are_read() -> None:
    sampling = read_sampling(trainer(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2), seed=3)
    assert sampling.params == SamplingParams(
        max_new_tokens=12,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        eos_token_ids=(1, 2),
        seed=3,
    )
    assert sampling.extra == {}


def test_generation_kwargs_win_and_the_unknown_ones_are_kept_apart() -> None:
    given = {"temperature": 0.5, "bad_words": ["x"]}
    sampling = read_sampling(trainer(given, temperature=0.7, top_p=0.9), seed=0)
    assert (sampling.params.temperature, sampling.params.top_p) == (0.5, 0.9)
    assert sampling.extra == {"bad_words": ["x"]}
    assert given == {"temperature": 0.5, "bad_words": ["x"]}, "the trainer's own dictionary is left as it was"


@pytest.mark.parametrize("off", [None, 0, -1])
@pytest.mark.parametrize("in_kwargs", [False, True])
def test_every_way_of_saying_off_is_off(off: int | None, in_kwargs: bool) -> None:
    options: dict[str, Any] = {"top_k": off, "min_p": None}
    sampling = read_sampling(trainer(options) if in_kwargs else trainer(**options), seed=0)
    assert (sampling.params.top_k, sampling.params.min_p) == (0, 0.0)
    assert sampling.params.plain


def test_a_value_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]"):
        read_sampling(trainer({"top_p": 1.5}), seed=0)
