"""A trainer's sampling options, read for either engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl.sampling import OPTIONS, read_sampling


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


def test_none_is_off_for_every_option() -> None:
    options = dict.fromkeys(OPTIONS)
    for given in (trainer(options), trainer(**options)):
        assert read_sampling(given, seed=0).params == SamplingParams(max_new_tokens=12, eos_token_ids=(1, 2))


@pytest.mark.parametrize(
    ("given", "expected"),
    [([None], ()), ([-1], ()), ([None, 3], (3,)), (None, ()), (4, (4,)), ([2, -1], (2,))],
    ids=str,
)
def test_ending_tokens_may_be_none(given: Any, expected: tuple[int, ...]) -> None:
    of = trainer()
    of.eos_token_ids = given
    assert read_sampling(of, seed=0).params.eos_token_ids == expected


NEUTRAL = {
    "do_sample": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "stop": None,
    "suppress_tokens": None,
    "eos_token_id": -1,
    "max_new_tokens": 12,
    "use_cache": False,
    "pad_token_id": 0,
    "length_penalty": 2.0,
    "presence_penalty": 0.0,
    "n": 1,
    "seed": None,
}


def test_entries_that_change_nothing_are_dropped() -> None:
    assert read_sampling(trainer(NEUTRAL), seed=0).extra == {}


@pytest.mark.parametrize(
    "entry",
    [{"num_beams": 2}, {"typical_p": 0.9}, {"min_new_tokens": 3}, {"stop": ["x"]}, {"unheard_of": None}],
    ids=str,
)
def test_entries_that_ask_for_something_are_kept(entry: dict[str, Any]) -> None:
    assert read_sampling(trainer(NEUTRAL | entry), seed=0).extra == entry


@pytest.mark.parametrize(
    ("entry", "advice"),
    [
        ({"do_sample": False}, "temperature=0"),
        ({"do_sample": None}, "temperature=0"),
        ({"max_new_tokens": 5}, "max_completion_length"),
        ({"eos_token_id": [1, 7]}, "generation_config"),
    ],
    ids=str,
)
def test_entries_against_the_trainer_are_refused_with_advice(entry: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        read_sampling(trainer(entry), seed=0)


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
