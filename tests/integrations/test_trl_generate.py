"""Calls of `model.generate` that the engine answers, and those that it leaves to transformers."""

from __future__ import annotations

import copy
import logging
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


Answers = dict[str, Any]


def both(model: Any, prompts: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """What transformers generates with this policy, and what its `generate` does."""
    return type(model).generate(model, prompts, **options), model.generate(prompts, **options)


def ask(model: Any) -> Answers:
    """Calls of all kinds of a policy that is served; each with what transformers itself says."""
    model.eval()
    greedy = {"attention_mask": MASK, "generation_config": GREEDY}
    beams = {"attention_mask": MASK, "num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.neg_()
    return {
        "greedy": both(model, PROMPTS, **greedy),
        "as_dict": model.generate(input_ids=PROMPTS, return_dict_in_generate=True, **greedy),
        "several": model.generate(PROMPTS, SAMPLING, attention_mask=MASK, num_return_sequences=2),
        "beams": both(model, PROMPTS, **beams),
        "beams_again": both(model, PROMPTS, **beams),
        "twin": both(twin, PROMPTS, **greedy),
    }


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, list[str], AtlasRolloutEngine]:
    """Answers that a policy gave in the middle of a training; what was warned of; and the engine."""
    trainer = build_other("a2po", tmp_path_factory.mktemp("a2po"), max_steps=1)
    answers: Answers = {}
    loss, logger = trainer.compute_loss, logging.getLogger("atlas_rl")

    def calling(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        answers.update(ask(trainer.model))
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = calling
    engine = AtlasRolloutEngine(console=False).attach(trainer)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    trainer.train()
    logger.removeHandler(handler)
    return answers, [record for record in records if "left to transformers" in record], engine


def test_greedy_answers_are_those_of_transformers(asked: Any) -> None:
    answers, _, _ = asked
    plain, answer = answers["greedy"]
    assert torch.equal(plain, answer)
    assert (plain[:, 4:] == 0).any(), "some rows end early and are padded"
    assert isinstance(answers["as_dict"], GenerateDecoderOnlyOutput)
    assert torch.equal(plain, answers["as_dict"].sequences)


def test_several_sequences_of_a_prompt_lie_together(asked: Any) -> None:
    answer = asked[0]["several"]
    assert torch.equal(answer[:, :4], PROMPTS.repeat_interleave(2, dim=0))
    assert not torch.equal(answer[0], answer[1])


def test_what_cannot_be_served_is_left_to_transformers_and_told_once(asked: Any) -> None:
    answers, told, engine = asked
    for name in ("beams", "beams_again"):
        assert torch.equal(*answers[name])
    assert len(told) == 1
    assert "num_beams=2" in told[0]
    assert [report.num_requests for report in engine.reports] == [4 + 3 + 3 + 6], (
        "the trainer's own, and those that were served"
    )


def test_a_copy_of_the_policy_keeps_its_own_generate(asked: Any) -> None:
    answers, _, _ = asked
    assert torch.equal(*answers["twin"])
    assert not torch.equal(answers["twin"][0], answers["greedy"][0])


PLAIN = {"max_new_tokens": 4, "eos_token_ids": (1,)}


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (SAMPLING, {}, {"max_new_tokens": 9, "temperature": 0.8}),
        (SAMPLING, {"min_p": 0.1, "eos_token_id": [1, 7]}, {"min_p": 0.1, "eos_token_ids": (1, 7)}),
        (None, {"max_new_tokens": 4}, {"temperature": 0.0}),
        (None, {"max_new_tokens": 4, "top_p": 0.9, "repetition_penalty": 2}, {"temperature": 0, "repetition_penalty": 2}),
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
        ({"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
        ({"attention_mask": MASK.flip(1)}, "padded within or on the right"),
        ({"attention_mask": 0 * MASK}, "padded within or on the right"),
        ({"attention_mask": MASK.tolist()}, "no table of zeros and ones"),
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
