"""Calls of `model.generate` that the engine answers, and those that it leaves to transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria, MinLengthLogitsProcessor

from atlas_rl import AtlasRolloutEngine
from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl.generate_call import read_call
from tests.other_trainers import build_other, policy

PROMPTS = torch.tensor([[0, 0, 2, 3], [4, 5, 6, 7], [0, 8, 2, 3]])
MASK = (PROMPTS != 0).long()
GREEDY = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=1)
SAMPLING = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.8, top_k=0, pad_token_id=0)


def inside(folder: Path, run: Callable[[Any], Any]) -> tuple[Any, AtlasRolloutEngine]:
    """What `run(policy)` returns where a trainer's policy is served; and the engine, whose reports count its calls."""
    trainer = build_other("gkd", folder, max_steps=1, lmbda=0.0)
    answers = []
    loss = trainer.compute_loss

    def calling(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        answers.append(run(trainer.model))
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = calling
    engine = AtlasRolloutEngine(console=False).attach(trainer)
    trainer.train()
    return answers[0], engine


@pytest.mark.parametrize("as_dict", [False, True])
def test_greedy_answers_are_those_of_transformers(as_dict: bool, tmp_path: Path) -> None:
    options = {"attention_mask": MASK, "generation_config": GREEDY, "return_dict_in_generate": as_dict}

    def both(model: Any) -> tuple[Any, Any]:
        plain = type(model).generate(model.eval(), PROMPTS, **options)
        answer = model.generate(input_ids=PROMPTS, **options) if as_dict else model.generate(PROMPTS, **options)
        return plain, answer

    (plain, answer), engine = inside(tmp_path, both)
    assert len(engine.reports) == 1
    if as_dict:
        assert isinstance(answer, GenerateDecoderOnlyOutput)
        plain, answer = plain.sequences, answer.sequences
    assert torch.equal(plain, answer)
    assert (plain[:, 4:] == 1).any(), "some rows end early and are padded"


def test_several_sequences_of_a_prompt_lie_together(tmp_path: Path) -> None:
    answer, engine = inside(
        tmp_path, lambda model: model.generate(PROMPTS, SAMPLING, attention_mask=MASK, num_return_sequences=2)
    )
    assert torch.equal(answer[:, :4], PROMPTS.repeat_interleave(2, dim=0))
    assert engine.reports[0].num_requests == 6
    assert not torch.equal(answer[0], answer[1])


def test_what_cannot_be_served_is_left_to_transformers_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beams = {"attention_mask": MASK, "num_beams": 2, "max_new_tokens": 5, "do_sample": False}

    def run(model: Any) -> list[Any]:
        return [type(model).generate(model, PROMPTS, **beams), *(model.generate(PROMPTS, **beams) for _ in range(2))]

    (plain, *answers), engine = inside(tmp_path, run)
    assert all(torch.equal(plain, answer) for answer in answers)
    assert not engine.reports
    told = [record.message for record in caplog.records if "left to transformers" in record.message]
    assert len(told) == 1
    assert "num_beams=2" in told[0]


def test_a_copy_of_the_policy_keeps_its_own_generate(tmp_path: Path) -> None:
    def of_copy(model: Any) -> tuple[Any, Any]:
        twin = copy.deepcopy(model).eval()
        with torch.no_grad():
            twin.get_output_embeddings().weight[5] = 100 * twin.get_output_embeddings().weight[5].abs()
        options = {"attention_mask": MASK, "generation_config": GREEDY}
        return type(twin).generate(twin, PROMPTS, **options), twin.generate(PROMPTS, **options)

    (plain, answer), engine = inside(tmp_path, of_copy)
    assert torch.equal(plain, answer)
    assert not engine.reports


PLAIN = {"max_new_tokens": 4, "eos_token_ids": (1,)}


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (SAMPLING, {}, {"max_new_tokens": 9, "temperature": 0.8}),
        (SAMPLING, {"temperature": 0.5, "min_p": 0.1, "eos_token_id": [1, 7]}, {"temperature": 0.5, "min_p": 0.1, "eos_token_ids": (1, 7)}),
        (None, {"max_new_tokens": 4}, {"temperature": 0.0}),
        (None, {"max_new_tokens": 4, "top_p": 0.9, "repetition_penalty": 1.2}, {"temperature": 0.0, "repetition_penalty": 1.2}),
        (None, {"max_new_tokens": 4, "do_sample": True, "top_p": 0.9}, {"top_p": 0.9, "top_k": 50}),
        (GenerationConfig(max_new_tokens=4, do_sample=True), {}, {"top_k": 50}),
    ],
    ids=str,
)  # fmt: skip
def test_options_are_read_as_transformers_reads_them(
    config: GenerationConfig | None, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = policy()
    call = read_call(model, (PROMPTS, config), {"attention_mask": MASK, **options})
    base = PLAIN if config is None or config.max_new_tokens == 4 else PLAIN | {"max_new_tokens": 9, "temperature": 0.8}
    assert call.params == SamplingParams(**(base | expected))
    assert call.prompts == [[2, 3], [4, 5, 6, 7], [8, 2, 3]]
    assert (call.pad_token_id, call.as_dict) == (0, False)


def test_the_policys_own_configuration_fills_what_a_call_leaves_open() -> None:
    model = get_peft_model(policy(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.generation_config.top_k = 7
    call = read_call(model, (), {"input_ids": PROMPTS, "max_new_tokens": 4, "do_sample": True})
    assert call.params.top_k == 7
    assert call.prompts[0] == [2, 3], "transformers sees the padding without a mask"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 1)])}, "logits_processor"),
        ({"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(5)])}, "stopping_criteria"),
        ({"prefix_allowed_tokens_fn": lambda batch, tokens: [2]}, "prefix_allowed_tokens_fn"),
        ({"assistant_model": policy(2)}, "assistant_model"),
        ({"inputs_embeds": torch.zeros(3, 4, 64)}, "inputs_embeds"),
        ({"pixel_values": torch.zeros(3, 4)}, "pixel_values"),
        ({"streamer": print}, "streamer"),
        ({"negative_prompt_ids": PROMPTS}, "negative_prompt_ids"),
        ({"position_ids": PROMPTS}, "position_ids"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"min_new_tokens": 3}, "min_new_tokens=3"),
        ({"penalty_alpha": 0.5}, "penalty_alpha"),
        ({"return_dict_in_generate": True, "output_scores": True}, "asks for output_scores"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "asks for output_hidden_states"),
        ({"max_new_tokens": None}, "max_new_tokens is not set"),
        ({"max_new_tokens": None, "max_length": 20}, "max_new_tokens is not set"),
        ({"num_return_sequences": 2, "do_sample": False}, "several greedy"),
        ({"attention_mask": MASK.flip(1)}, "padded within or on the right"),
        ({"attention_mask": MASK * 0 + torch.tensor([0, 0, 0, 0])}, "padded within or on the right"),
        ({"attention_mask": torch.ones(3, 1, 4, 4)}, "no table of zeros and ones"),
        ({"temperature": -1.0}, "temperature"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)  # fmt: skip
def test_what_cannot_be_served_is_named(options: dict[str, Any], reason: str) -> None:
    asked = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": True} | options
    with pytest.raises(ValueError, match=reason):
        read_call(policy(), (PROMPTS,), asked)


def test_prompts_must_be_token_ids() -> None:
    for wrong in (None, [[1, 2]], torch.ones(2, 3), torch.ones(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="not a table of token ids"):
            read_call(policy(), (wrong,), {"max_new_tokens": 4})
