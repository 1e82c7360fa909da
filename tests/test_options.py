"""Every option and argument against values of every wrong kind: a `ValueError` that names the option and the value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from atlas_rl import AtlasRolloutEngine, SamplingParams
from atlas_rl.config import EngineConfig
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.sync.refresh import PolicyTracker
from tests.engines import engine_of, policy

VALUES: dict[str, Any] = {
    "None": None,
    "text": "3",
    "no text": "",
    "a fraction": 2.5,
    "True": True,
    "NaN": math.nan,
    "below 0": -1,
    "an object": object(),
    "an empty list": [],
    "a list": [1],
    "nested": [[1]],
    "an array": np.array([1, 2]),
    "a tensor": torch.tensor([1, 2]),
    "a class": HistorySpeculator,
}

GENERATE: dict[str, tuple[str, ...]] = {
    "max_new_tokens": (),
    "num_generations": (),
    "temperature": ("a fraction",),
    "top_k": (),
    "top_p": (),
    "min_p": (),
    "repetition_penalty": ("a fraction",),
    "eos_token_ids": ("an empty list", "a list", "an array", "a tensor"),
    "seed": ("None",),
}
"""Arguments of `generate`, and which of the values they take."""

CONFIG: dict[str, tuple[str, ...]] = {
    "speculation": ("True",),
    "verification": (),
    "draft_model": ("None",),
    "speculators": ("None", "an empty list"),
    "controller": ("None",),
    "max_batch_size": ("None",),
    "output_dir": ("None", "text"),
    "trace": (),
    "console": ("True",),
    "spare_importance_sampling": ("True",),
    "audit_share": (),
    "backend": (),
    "clock": ("a class",),
}

Refused = Callable[[Any], Any]


def engine_option(name: str) -> Refused:
    return lambda value: EngineConfig.of({name: value})


def argument(name: str) -> Refused:
    return lambda value: engine_of().generate([[1, 2]], **({"max_new_tokens": 1, "eos_token_ids": []} | {name: value}))


OTHERS: dict[str, tuple[Refused, tuple[str, ...]]] = {
    "version": (lambda value: engine_of().policy_updated(value), ("None", "text")),
    "path": (lambda value: engine_of().save_drafters(value), ("text",)),
    "tokenizer": (lambda value: engine_of(tokenizer=value), ("None",)),
    "model": (lambda value: AtlasRolloutEngine(model=value, backend="in_process"), ("None",)),
    "prompts": (lambda value: engine_of().generate(value, max_new_tokens=1, eos_token_ids=[]), ("nested",)),
    "prompt": (lambda value: engine_of().generate([[1], value], max_new_tokens=1, eos_token_ids=[]),
               ("a list", "an array", "a tensor")),
}  # fmt: skip

CASES = [
    *((name, value, engine_option(name)) for name, taken in CONFIG.items() for value in VALUES if value not in taken),
    *((name, value, argument(name)) for name, taken in GENERATE.items() for value in VALUES if value not in taken),
    *((name, value, call) for name, (call, taken) in OTHERS.items() for value in VALUES if value not in taken),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "kind", "call"), CASES, ids=[f"{name}-{kind}" for name, kind, _ in CASES])
def test_a_wrong_value_is_named(name: str, kind: str, call: Refused, tmp_path: Path) -> None:
    value = VALUES[kind]
    with pytest.raises(ValueError) as refused:
        call(value)
    message = str(refused.value)
    assert name in message
    said = re.sub(r" at 0x\w+", "", " ".join(repr(value).split())), getattr(value, "__name__", "-")
    assert any(each in re.sub(r" at 0x\w+", "", message) for each in said) or EMPTY.get((name, kind), "-") in message
    assert len(message) < 400
    assert not any(tmp_path.iterdir()), "nothing was done"


EMPTY = {
    ("prompts", "an empty list"): "prompts is empty",
    ("prompt", "an empty list"): "prompt 1 is empty",
    ("prompts", "a list"): "a single prompt is [[1]]",
    ("prompts", "an array"): "a single prompt is [[1, 2]]",
    ("prompts", "a tensor"): "a single prompt is [[1, 2]]",
    (
        "eos_token_ids",
        "None",
    ): "no ending token is known: give the engine a tokenizer, or generate() eos_token_ids=[...]",
    ("speculators", "a list"): "speculators[0] must be a Speculator object, got 1",
    ("speculators", "nested"): "speculators[0] must be a Speculator object, got [1]",
    ("prompt", "nested"): "prompt 1 must be a flat list",
}
"""What is said of values that are no longer there as they were given."""


@pytest.mark.parametrize("name", [*CONFIG, *GENERATE])
def test_values_that_an_option_takes_are_taken(name: str) -> None:
    call, taken = (engine_option(name), CONFIG[name]) if name in CONFIG else (argument(name), GENERATE[name])
    for kind in taken:
        call(VALUES[kind])


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    given = SamplingParams(
        max_new_tokens=np.int64(4),  # type: ignore[arg-type]
        temperature=torch.tensor(0.5),  # type: ignore[arg-type]
        top_p=np.float32(0.5),  # type: ignore[arg-type]
        eos_token_ids=torch.tensor([1, 3]),  # type: ignore[arg-type]
    )
    assert given == SamplingParams(max_new_tokens=4, temperature=0.5, top_p=0.5, eos_token_ids=(1, 3))
    assert {type(given.max_new_tokens), *map(type, given.eos_token_ids)} == {int}
    assert EngineConfig(max_batch_size=np.int64(2), console=np.bool_(False)).console is False  # type: ignore[arg-type]


def test_one_ending_token_needs_no_list() -> None:
    one, several = (
        engine_of().generate([[5, 9, 2]], max_new_tokens=9, eos_token_ids=given, seed=1) for given in (17, [17])
    )
    assert one.completion_ids == several.completion_ids
    assert SamplingParams(max_new_tokens=1, eos_token_ids=1).eos_token_ids == (1,)  # type: ignore[arg-type]


HINTS: dict[str, tuple[Callable[[], Any], str]] = {
    "n": (lambda: argument("n")(4), "did you mean 'num_generations'"),
    "num_return_sequences": (lambda: argument("num_return_sequences")(2), "did you mean 'num_generations'"),
    "max_tokens": (lambda: argument("max_tokens")(2), "did you mean 'max_new_tokens'"),
    "eos_token_id": (lambda: argument("eos_token_id")(2), "did you mean 'eos_token_ids'"),
    "one prompt": (lambda: engine_of().generate([2, 3, 4], max_new_tokens=1, eos_token_ids=1),
                   r"a single prompt is \[\[2, 3, 4\]\]"),
    "text": (lambda: engine_of().generate(["a b"], max_new_tokens=1, eos_token_ids=1), "'a b': tokenize it"),
    "one text": (lambda: engine_of().generate("a b", max_new_tokens=1, eos_token_ids=1), "'a b': tokenize it"),
    "attach": (lambda: AtlasRolloutEngine().attach(None, baselineevery=2), "did you mean 'baseline_every'"),  # type: ignore[arg-type]
    "attach to a policy": (lambda: AtlasRolloutEngine().attach(policy()), r"takes an initialised .* got a LlamaForCausalLM"),
    "a name in process": (
        lambda: AtlasRolloutEngine(model="org/name", backend="in_process"),
        r"AutoModelForCausalLM.from_pretrained\('org/name'\)",
    ),
    "a path that is not there": (lambda: AtlasRolloutEngine(model="/nope"), "no such folder.* vLLM.*in process"),
    "a Path that is not there": (lambda: AtlasRolloutEngine(model=Path("nope")), "no such folder"),
    "a draft model of the hub": (lambda: engine_of(draft_model="org/name"), "'org/name', which is no folder.*download"),
    "an empty folder as draft model": (lambda: engine_of(draft_model="."),
                                       r"config.json is missing\. Give .* wrote\. A four-bit"),
    "classes": (lambda: engine_of(speculators=[HistorySpeculator]), r"HistorySpeculator\(\.\.\.\)"),
    "a controller's class": (lambda: engine_of(controller=GoodputController), r"make one, GoodputController\(\.\.\.\)"),
    "a name of the policy": (lambda: AtlasRolloutEngine(modle=policy()), "did you mean 'model'.* it takes model, tokenizer"),
    "a name of the tokenizer": (lambda: AtlasRolloutEngine(tokeniser=None), "did you mean 'tokenizer'"),
    "stop": (lambda: argument("stop")(["a"]), r"no option 'stop': stop strings are not supported.* completion\. it takes"),
    "do_sample": (lambda: argument("do_sample")(False), "temperature=0 is greedy"),
    "a loaded policy for vLLM": (
        lambda: AtlasRolloutEngine(model=policy(), backend="vllm"),
        "backend='vllm' takes a checkpoint's folder or name, or a vllm.LLM, got LlamaForCausalLM: a loaded model runs",
    ),
    "no drafters' file": (lambda: engine_of().load_drafters("x.st"), "path='x.st' does not exist: give a file"),
    "a folder for the drafters": (lambda: engine_of().save_drafters("."), r"is a folder: name the file in it"),
    "a folder of drafters": (lambda: engine_of().load_drafters("."), "is a folder: give a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HINTS)
def test_the_cure_is_named(case: str) -> None:
    call, message = HINTS[case]
    with pytest.raises(ValueError, match=message) as refused:
        call()
    assert ".." not in str(refused.value).replace("...", "")
    assert ".;" not in str(refused.value)


def test_a_policy_without_its_name_is_told_the_name() -> None:
    with pytest.raises(TypeError, match=r"by name: AtlasRolloutEngine\(model=policy, tokenizer=\.\.\.\)"):
        AtlasRolloutEngine(policy())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("offline"), RepositoryNotFoundError.__new__(RepositoryNotFoundError)],
)
def test_a_name_that_no_hub_has_is_told_what_names_are_for(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_llm(*_: Any) -> Any:
        raise OSError("transformers could not load it") from error

    monkeypatch.setattr("atlas_rl.vllm.backend.build_llm", build_llm)
    with pytest.raises(ValueError, match="'org/name' is neither a folder nor in the hub's cache") as refused:
        AtlasRolloutEngine(model="org/name")
    assert "AutoModelForCausalLM.from_pretrained('org/name')" in str(refused.value)
    assert refused.value.__cause__.__cause__ is error  # type: ignore[union-attr]


def test_another_error_of_loading_a_name_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_llm(*_: Any) -> Any:
        raise OSError("the disk is full")

    monkeypatch.setattr("atlas_rl.vllm.backend.build_llm", build_llm)
    with pytest.raises(OSError, match="the disk is full"):
        AtlasRolloutEngine(model="org/name")


@pytest.mark.parametrize("kind", [str, Path])
def test_drafters_are_saved_and_loaded_by_text_and_by_path(kind: Any) -> None:
    engine = engine_of()
    engine.save_drafters(kind("x.st"))
    assert Path("x.st").is_file()
    engine_of().load_drafters(kind("x.st"))


def test_a_version_is_a_number_that_does_not_fall() -> None:
    engine = engine_of()
    engine.policy_updated("7")  # type: ignore[arg-type]
    assert engine.policy_version == 7
    for wrong in (0, 6, "6", 7.5, True, [8], torch.tensor([8])):
        with pytest.raises(ValueError, match="policy version"):
            engine.policy_updated(wrong)  # type: ignore[arg-type]
        assert engine.policy_version == 7
    engine.policy_updated()
    assert engine.policy_version == 8
    assert PolicyTracker().checked(np.int64(3)) == 3  # type: ignore[arg-type]
