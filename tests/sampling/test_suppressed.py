"""Suppressed tokens are never drawn, and the others as without them, whatever is drafted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import SamplingParams
from atlas_rl.rollout.output import GenerationOutput
from atlas_rl.speculators.draft_lm import DraftLM
from tests.engines import EOS, MAX_NEW, PROMPTS, VOCAB, draft_model, engine_of, policy

SUPPRESSED = (*range(20), VOCAB + 3)  # a token that the policy does not have is never drawn anyway


def rolled_out(engine: Any, **options: Any) -> GenerationOutput:
    sampling = SamplingParams(max_new_tokens=MAX_NEW, eos_token_ids=tuple(EOS), seed=3, **options)
    return engine.rollout(engine.model, PROMPTS, sampling, num_generations=4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_they_are_never_drawn(verification: str, options: dict[str, float]) -> None:
    plain = rolled_out(engine_of(speculation=False), **options)
    assert {token for row in plain.completion_ids for token in row} & set(SUPPRESSED)
    drafter = DraftLM(draft_model(), VOCAB)
    engine = engine_of(
        speculators=[drafter],
        controller=FixedController([drafter.name], drafter.name, 4),
        verification=verification,
        audit_share=1.0,
    )
    output = rolled_out(engine, suppress_tokens=SUPPRESSED, **options)
    assert sum(output.report.drafted.values()) > 0
    assert output.report.warnings == (), "the audit knows of them"
    drawn = {token for row in output.completion_ids for token in row}
    assert not drawn & set(SUPPRESSED)
    if verification == "invariant" or options.get("temperature") == 0:
        without = rolled_out(engine_of(speculation=False), suppress_tokens=SUPPRESSED, **options)
        assert without.completion_ids == output.completion_ids


def test_logprobs_are_those_of_transformers() -> None:
    output = rolled_out(engine_of(), suppress_tokens=SUPPRESSED, temperature=0.7, top_k=9)
    processors = LogitsProcessorList(
        [SuppressTokensLogitsProcessor(list(SUPPRESSED)), TemperatureLogitsWarper(0.7), TopKLogitsWarper(9)]
    )
    for prompt, completion, logprobs in zip(output.prompt_ids, output.completion_ids, output.logprobs, strict=True):
        tokens = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = policy()(tokens).logits[0, len(prompt) - 1 : -1].float()
        expected = processors(tokens, logits).log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_wrong_value_is_named() -> None:
    with pytest.raises(ValueError, match="suppress_tokens must be"):
        SamplingParams(max_new_tokens=1, suppress_tokens="x")  # type: ignore[arg-type]
