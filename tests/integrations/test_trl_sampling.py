"""A trainer's sampling options, read for either engine."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from atlas_rl.checks import shown
from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl.sampling import (
    OPTIONS,
    beyond_its_attributes,
    left_to_the_policy,
    read_sampling,
    with_suppressed,
)


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


@pytest.mark.parametrize(
    "entry",
    [
        {"suppress_tokens": np.array([])},
        {"suppress_tokens": torch.tensor([])},
        {"bad_words_ids": ()},
        {"n": torch.tensor(1)},
        {"do_sample": np.bool_(True)},
        {"eos_token_id": torch.tensor([1, 2])},
        {"max_new_tokens": np.int64(12)},
    ],
    ids=str,
)
def test_neutral_values_of_every_type_are_dropped(entry: dict[str, Any]) -> None:
    assert read_sampling(trainer(entry), seed=0).extra == {}


@pytest.mark.parametrize(
    "entry",
    [
        {"n": torch.tensor([1, 1])},
        {"n": "1"},
        {"suppress_tokens": np.array([3, 4])},
        {"suppress_tokens": torch.tensor([3])},
        {"typical_p": np.array([1.0, 1.0])},
        {"no_repeat_ngram_size": [[]]},
        {"stop": ""},
    ],
    ids=str,
)
def test_values_of_every_type_that_ask_for_something_are_kept(entry: dict[str, Any]) -> None:
    assert list(read_sampling(trainer(entry), seed=0).extra) == list(entry)


def named(value: Any) -> str:
    """A test's name, the same in every process."""
    return "object" if type(value) is object else str(value)


WRONG: tuple[Any, ...] = ("1", True, [[1]], object(), math.nan, 2.5, np.array([1, 2]), torch.tensor([[1]]), {1: 2})


@pytest.mark.parametrize("value", WRONG, ids=named)
@pytest.mark.parametrize("name", [*OPTIONS, "eos_token_id", "max_new_tokens", "do_sample"])
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    takes = {2.5: ("temperature", "repetition_penalty"), True: ("do_sample",)}
    if isinstance(value, float | bool) and name in takes.get(value, ()):
        return
    if name == "eos_token_id" and isinstance(value, np.ndarray):
        return
    with pytest.raises(ValueError, match=name) as refused:
        read_sampling(trainer({name: value}), seed=0)
    assert shown(value) in str(refused.value)


@pytest.mark.parametrize("value", ["12", None, True, 0, 2.5])
def test_the_trainers_own_option_is_named(value: Any) -> None:
    of = trainer()
    of.max_completion_length = value
    with pytest.raises(ValueError, match=f"max_completion_length must be .* got {value!r}"):
        read_sampling(of, seed=0)


def test_do_sample_is_quoted_as_it_was_given() -> None:
    for value, said in ((False, "do_sample=False: Leave"), (None, "do_sample=None: transformers takes that for False")):
        with pytest.raises(ValueError, match=said):
            read_sampling(trainer({"do_sample": value}), seed=0)


@pytest.mark.parametrize(
    ("given", "wanted"), [(torch.tensor([1, 3]), (1, 3)), (torch.tensor(4), (4,)), ([1, None], (1,))]
)
def test_ending_tokens_may_be_tensors(given: Any, wanted: tuple[int, ...]) -> None:
    of = trainer()
    of.eos_token_ids = given
    assert read_sampling(of, seed=0).params.eos_token_ids == wanted


@pytest.mark.parametrize("given", ["1", [[1]], [1.5], True, object()], ids=named)
def test_ending_tokens_that_are_none_are_refused(given: Any) -> None:
    of = trainer()
    of.eos_token_ids = given
    with pytest.raises(ValueError, match="eos_token_id of the policy's generation_config"):
        read_sampling(of, seed=0)


def test_the_policys_own_config_holds_where_the_trainer_has_nothing() -> None:
    """As in `transformers.generate`, by which TRL generates."""
    config = GenerationConfig(min_p=0.3, temperature=0.2, no_repeat_ngram_size=2, max_new_tokens=5, length_penalty=2.0)
    config.chat_format = "of its own"
    of = trainer({"no_repeat_ngram_size": None}, repetition_penalty=None)
    of.model = SimpleNamespace(generation_config=config)
    sampling = read_sampling(of, 0, left_to_the_policy(of))
    assert sampling.params == SamplingParams(max_new_tokens=12, min_p=0.3, eos_token_ids=(1, 2))
    assert sampling.extra == {"no_repeat_ngram_size": 2}
    of.args.generation_kwargs = {"no_repeat_ngram_size": 0, "min_p": 0.1}
    sampling = read_sampling(of, 0, left_to_the_policy(of))
    assert (sampling.params.min_p, sampling.extra) == (0.1, {})


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


def test_what_the_trainers_config_has_beyond_its_attributes_precedes_the_policys() -> None:
    of = trainer({"no_repeat_ngram_size": None})
    of.model = SimpleNamespace(generation_config=GenerationConfig(suppress_tokens=[3], no_repeat_ngram_size=2))
    of.generation_config = GenerationConfig(suppress_tokens=[4], temperature=0.3, min_p=0.5, max_new_tokens=3)
    assert beyond_its_attributes(of) == {"suppress_tokens": [4]}
    sampling = with_suppressed(read_sampling(of, 0, left_to_the_policy(of) | beyond_its_attributes(of)))
    assert sampling.params == SamplingParams(max_new_tokens=12, eos_token_ids=(1, 2), suppress_tokens=(4,))
    assert sampling.extra == {"no_repeat_ngram_size": 2}


def test_wrong_tokens_to_suppress_are_named() -> None:
    with pytest.raises(ValueError, match="suppress_tokens must be"):
        with_suppressed(read_sampling(trainer({"suppress_tokens": [[3]]}), seed=0))
