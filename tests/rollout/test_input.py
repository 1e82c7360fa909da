"""Bad calls and bad options: each is refused in words that say what to do."""

from __future__ import annotations

import inspect
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.base import Step
from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.speculators.draft_lm import DraftLM
from tests.drafters import RandomDrafter
from tests.engines import (
    PROMPTS,
    VOCAB,
    draft_model,
    engine_of,
    fixed,
    generate,
    policy,
    reference,
    state_of,
    tokenizer,
)
from tests.models import tiny_llama

BAD_CALLS = {
    "no prompts": ({"prompts": []}, "at least one"),
    "empty prompt": ({"prompts": [[1], []]}, r"prompt 1 is empty.*at least one token"),
    "a flat list": ({"prompts": [1, 2, 3]}, "flat list of token ids"),
    "text": ({"prompts": ["hello"]}, "token ids"),
    "one text": ({"prompts": "hello"}, "lists of token ids, one per prompt, got str"),
    "a tokenizer's output": ({"prompts": {"input_ids": [[1]]}}, "one per prompt, got dict"),
    "nothing": ({"prompts": None}, "got NoneType"),
    "lists within a prompt": ({"prompts": [[1], [[1], [2, 3]]]}, "prompt 1 must be a flat list.*nested"),
    "a tensor of floats": ({"prompts": [torch.ones(3)]}, "prompt 0 must be a flat list.*float"),
    "floats": ({"prompts": [[1.0, 2.0]]}, "token ids"),
    "token beyond the vocabulary": ({"prompts": [[1], [2, 64]]}, r"prompt 1.*64.*vocabulary of 64"),
    "negative token": ({"prompts": [[-1]]}, r"-1.*vocabulary"),
    "prompt beyond the context": ({"prompts": [[1] * 129]}, r"129 tokens.*context of 128"),
    "no tokens wanted": ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
    "half a token wanted": ({"max_new_tokens": 2.5}, "max_new_tokens"),
    "half a generation": ({"num_generations": 1.5}, "num_generations must be a whole number of at least 1, got 1.5"),
    "no generations": ({"num_generations": 0}, "num_generations must be a whole number of at least 1, got 0"),
    "temperature below 0": ({"temperature": -0.1}, "temperature"),
    "temperature NaN": ({"temperature": math.nan}, "temperature"),
    "top_p 0": ({"top_p": 0.0}, r"top_p.*\(0, 1\]"),
    "top_p above 1": ({"top_p": 1.1}, "top_p"),
    "top_k below 0": ({"top_k": -1}, "top_k"),
    "min_p above 1": ({"min_p": 2}, "min_p"),
    "no penalty": ({"repetition_penalty": 0}, "repetition_penalty"),
    "negative seed": ({"seed": -1}, "seed"),
    "ending token outside": ({"eos_token_ids": [64]}, "eos_token_ids.*64"),
    "unknown option": ({"temprature": 1}, r"generate\(\).*did you mean 'temperature'"),
    "no ending token": ({"eos_token_ids": None}, "tokenizer"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_says_what_to_do_and_does_nothing(case):
    options, message = BAD_CALLS[case]
    engine, before = engine_of(), state_of(policy())
    with pytest.raises(ValueError, match=message):
        generate(engine, **options)
    assert engine.reports == []
    assert engine._calls == 0
    assert state_of(policy()) == before
    assert generate(engine).completion_ids == reference().completion_ids


def test_a_misspelled_length_is_named_rather_than_called_missing():
    with pytest.raises(ValueError, match=r"no option 'max_tokens': did you mean 'max_new_tokens'"):
        engine_of().generate([[1]], max_tokens=2)
    with pytest.raises(ValueError, match="needs max_new_tokens"):
        engine_of().generate([[1]])
    shown = inspect.signature(AtlasRolloutEngine.generate).parameters["max_new_tokens"]
    assert str(shown).endswith("= required"), "help() shows it"


BAD_OPTIONS = {
    "unknown option": ({"draft_modle": None}, "did you mean 'draft_model'"),
    "verification typo": ({"verification": "invarient"}, "'invariant' or 'rejection'.*'invarient'"),
    "unknown backend": ({"backend": "vlm"}, "backend"),
    "batch of none": ({"max_batch_size": 0}, "max_batch_size"),
    "a draft LM with another vocabulary": ({"draft_model": tiny_llama(vocab=32)}, "32 tokens.*64.*tokenizer"),
    "a draft LM that is no LM": ({"draft_model": nn.Linear(2, 2)}, "AutoModelForCausalLM"),
    "a draft LM that is not there": ({"draft_model": "/no/such/folder"}, "no checkpoint"),
    "a trace without a folder": ({"trace": True}, "output_dir"),
    "two names alike": ({"speculators": [RandomDrafter(), RandomDrafter()]}, "different names"),
    "draft LM and speculators": (
        {"draft_model": nn.Linear(2, 2), "speculators": [RandomDrafter()]},
        "either.*Eagle3Speculator.*EAGLE-3.*MtpSpeculator.*MTP.*Fp4SelfSpeculator.*DraftLM",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_says_what_to_do(case):
    options, message = BAD_OPTIONS[case]
    before = state_of(policy())
    with pytest.raises(ValueError, match=message):
        engine_of(**options)
    assert state_of(policy()) == before


def test_an_engine_without_a_policy_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"model=.*attach"):
        AtlasRolloutEngine().generate([[1]], max_new_tokens=2)


@pytest.mark.parametrize("model", [{"a": 1}, 7, object()])
def test_something_else_for_a_policy_is_refused(model):
    with pytest.raises(ValueError, match=r"loaded causal LM, a vllm.LLM, or the folder .*, got (dict|int|object)"):
        AtlasRolloutEngine(model=model, console=False, backend="vllm")


def test_a_checkpoint_folder_serves_as_draft_lm(tmp_path):
    draft_model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    engine = AtlasRolloutEngine(
        model=policy(),
        tokenizer=tokenizer(),
        draft_model=tmp_path,
        console=False,
        controller=FixedController(["history", "recurrent", "draft_lm"], "draft_lm", 3),
    )
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    loaded_in_memory = generate(fixed(DraftLM(draft_model(), VOCAB), 3)).report
    assert output.report.accepted["draft_lm"] == loaded_in_memory.accepted["draft_lm"] > 0


def test_a_draft_lm_with_another_tokenizer_is_refused(tmp_path):
    draft_model().save_pretrained(tmp_path)
    tokenizer(words="x").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        AtlasRolloutEngine(model=policy(), tokenizer=tokenizer(), draft_model=str(tmp_path), console=False)


def test_a_controller_for_other_speculators_is_refused():
    with pytest.raises(ValueError, match=r"made for speculators \['a'\], the engine has \['history', 'recurrent'\]"):
        engine_of(controller=FixedController(["a"], "a", 2))


def test_a_fixed_controller_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="no speculator 'b'"):
        FixedController(["a"], "b", 2)
    with pytest.raises(ValueError, match="speculation=False"):
        FixedController(["a"], "a", 0)


def test_a_goodput_controller_without_speculators_plans_nothing():
    assert GoodputController(()).plan(Step(np.full(4, 9), 0, [])) == {}


KINDS_OF_PROMPTS = {
    "tensors": lambda prompts: [torch.tensor(row) for row in prompts],
    "arrays": lambda prompts: [np.array(row, np.int32) for row in prompts],
    "unsigned arrays": lambda prompts: [np.array(row, np.uint8) for row in prompts],
    "tuples": lambda prompts: [tuple(row) for row in prompts],
    "lists of tensors": lambda prompts: [[torch.tensor(token) for token in row] for row in prompts],
    "a tuple of lists": tuple,
    "a generator": iter,
}


@pytest.mark.parametrize("kind", KINDS_OF_PROMPTS)
def test_prompts_of_any_kind_come_back_as_ints(kind):
    output = generate(engine_of(), KINDS_OF_PROMPTS[kind](PROMPTS))
    assert output.prompt_ids == [prompt for prompt in PROMPTS for _ in range(2)]
    assert output.completion_ids == reference().completion_ids
    assert {type(token) for row in output.prompt_ids for token in row} == {int}
    assert json.loads(json.dumps(output.prompt_ids)) == output.prompt_ids


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_one_array_is_several_prompts(kind):
    rows = [[5, 9, 2], [1, 2, 3]]
    output = generate(engine_of(), torch.tensor(rows) if kind == "tensor" else np.array(rows))
    assert output.prompt_ids == [rows[0], rows[0], rows[1], rows[1]]
    assert {type(token) for row in output.prompt_ids for token in row} == {int}


def test_embeddings_may_grow_between_calls():
    """The vocabulary is read again and drafters are bound anew, at the next call or policy update, whichever comes first."""
    model = tiny_llama(seed=11)
    engine = engine_of(model, draft_model=draft_model())
    generate(engine)
    for size in (70, 75):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.resize_token_embeddings(size, mean_resizing=False)
        if size == 75:
            engine.policy_updated()
        wanted = generate(engine_of(model, speculation=False), [[5, 9, 2], [size - 1]]).completion_ids
        assert any(token >= 64 for row in wanted for token in row)
        assert generate(engine, [[5, 9, 2], [size - 1]]).completion_ids == wanted
        engine.policy_updated()
    model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match=r"shrunk from 75 tokens to 60.*new engine"):
        generate(engine)
    with pytest.raises(ValueError, match="shrunk"):
        engine.policy_updated()
