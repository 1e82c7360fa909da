"""Tokenizers beside a model: a damaged one is named by its folder and option, whatever the library under it raises."""

from __future__ import annotations

import json

import pytest

from atlas_rl import AtlasRolloutEngine
from atlas_rl.speculators.causal_lm import load_tokenizer
from tests.engines import generate
from tests.models import tiny_bigram
from tests.train_command import save_policy

DAMAGED = {
    "cut off": lambda whole: whole[:200],
    "empty": lambda whole: "",
    "another object": lambda whole: "{}",
    "a list": lambda whole: "[]",
    "a model that is unknown": lambda whole: json.dumps(json.loads(whole) | {"model": {"type": "X"}}),
}


@pytest.fixture(params=DAMAGED)
def folder(request, tmp_path):
    save_policy(tmp_path, tiny_bigram(layers=1, seed=11))
    file = tmp_path / "tokenizer.json"
    file.write_text(DAMAGED[request.param](file.read_text()))
    return tmp_path


def test_a_damaged_tokenizer_is_named(folder, tmp_path_factory):
    with pytest.raises(ValueError, match=rf"^no tokenizer can be loaded from '{folder}' \(.*\): save it there"):
        load_tokenizer(folder)
    good = load_tokenizer(save_policy(tmp_path_factory.mktemp("good"), tiny_bigram(layers=1, seed=11)))
    with pytest.raises(ValueError, match=rf"draft_model: no tokenizer can be loaded from '{folder}'"):
        generate(AtlasRolloutEngine(model=tiny_bigram(seed=11), tokenizer=good, draft_model=folder, console=False))
