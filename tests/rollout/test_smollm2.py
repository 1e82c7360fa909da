"""On the real 135M policy: greedy equals transformers, one seed gives one text whatever is drafted, logprobs are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from tests import ROOT
from tests.drafters import Parrot, RandomDrafter, TrimByDrawnToken
from tests.models import tiny_llama

NEW = 24
EAGLE3 = ROOT / "examples" / "grpo_demo" / "eagle3"
TEXTS = ["What is 12 + 7?", "List three colours and say which you like best.", "Hi"]


@pytest.fixture(scope="module")
def prompts(smollm2: Any) -> list[list[int]]:
    _, tokenizer = smollm2
    rows = [[{"role": "user", "content": text}] for text in TEXTS]
    ids = [tokenizer.apply_chat_template(r, add_generation_prompt=True, tokenize=True, return_dict=True) for r in rows]
    return [row["input_ids"] for row in ids]


def test_greedy_is_what_transformers_generates(smollm2: Any, prompts: list[list[int]]) -> None:
    model, tokenizer = smollm2
    width = max(map(len, prompts))
    padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    reference = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=NEW)[:, width:].tolist()
    eos = tokenizer.eos_token_id
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in reference]
    engine = AtlasRolloutEngine(model=model, tokenizer=tokenizer, console=False)
    for _ in range(2):  # the second time the history knows every word
        output = engine.generate(prompts, max_new_tokens=NEW, temperature=0.0)
        assert output.completion_ids == expected
    assert output.report.accepted["history"] > 0


def test_one_seed_gives_one_text_whatever_is_drafted(smollm2: Any, prompts: list[list[int]]) -> None:
    model, tokenizer = smollm2
    plain = AtlasRolloutEngine(model=model, tokenizer=tokenizer, speculation=False, console=False)
    request: dict[str, Any] = {"num_generations": 2, "max_new_tokens": NEW // 2, "seed": 5}
    expected = plain.generate(prompts, **request)
    small = tiny_llama(vocab=model.config.vocab_size, context=512)
    recurrent = RecurrentSpeculator(budget_share=0.2)
    learning = AtlasRolloutEngine(model=model, tokenizer=tokenizer, speculators=[recurrent], console=False)
    learning.generate(prompts, num_generations=2, max_new_tokens=NEW, seed=6)
    learning.policy_updated()
    arms = {
        "history": (HistorySpeculator(), None),
        "recurrent": (recurrent, FixedController),
        "eagle3": (Eagle3Speculator(EAGLE3), FixedController),
        "draft_lm": (DraftLM(small, model.config.vocab_size), FixedController),
        "random": (RandomDrafter(), FixedController),
        "trimmed": (Parrot(expected.completion_ids, error_rate=0.2), TrimByDrawnToken),
        "parrot": (Parrot(expected.completion_ids, error_rate=0.2), FixedController),
    }
    for name, (speculator, controller) in arms.items():
        options = {} if controller is None else {"controller": controller([speculator.name], speculator.name, 3)}
        engine = AtlasRolloutEngine(
            model=model, tokenizer=tokenizer, speculators=[speculator], console=False, **options
        )
        assert engine.generate(prompts, **request).completion_ids == expected.completion_ids, name


def test_logprobs_are_those_of_a_plain_forward_pass(smollm2: Any, prompts: list[list[int]]) -> None:
    model, tokenizer = smollm2
    engine = AtlasRolloutEngine(model=model, tokenizer=tokenizer, console=False)
    engine.generate(prompts, num_generations=2, max_new_tokens=NEW, temperature=0.7, seed=1)
    output = engine.generate(prompts, num_generations=2, max_new_tokens=NEW, temperature=0.7, seed=1)
    assert output.report.accepted["history"] > 0
    for prompt, completion, logprobs in zip(output.prompt_ids, output.completion_ids, output.logprobs, strict=True):
        tokens = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = model(tokens).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(dim=-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
        assert torch.tensor(logprobs) == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.mark.slow
def test_the_shipped_eagle3_head_drafts_for_the_demo(demo: Any) -> None:
    """On task families that it was not trained on, at temperature 1."""
    policy, tokenizer = demo("policy").load_policy(warm=True)
    rows = demo("tasks").build_dataset("eval", 4, seed=3)["prompt"]
    ids = [tokenizer.apply_chat_template(r, add_generation_prompt=True, tokenize=True, return_dict=True) for r in rows]
    engine = AtlasRolloutEngine(
        model=policy,
        tokenizer=tokenizer,
        speculators=[Eagle3Speculator(EAGLE3)],
        controller=FixedController(["eagle3"], "eagle3", 3),
        console=False,
    )
    output = engine.generate([row["input_ids"] for row in ids], num_generations=2, max_new_tokens=40, seed=0)
    assert output.report.accepted_length > 1.3
