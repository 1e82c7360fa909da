"""Draft tokens whose embeddings are not finite, and drafts behind an ending token: neither decides on the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import Draft, SamplingParams
from atlas_rl.decode.stand_ins import stand_in
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.logits import NonFiniteLogits, rows_not_finite
from atlas_rl.sampling.by_kernels import FusedVerifier
from atlas_rl.sampling.verification import DrafterInvariant, RejectionSampling
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from tests.drafters import Interposing
from tests.engines import VOCAB, engine_of, generate
from tests.models import tiny_llama
from tests.verification import case

UNUSED = 60
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 4, 11, 2, 9, 5, 6]]
NAN, INF = float("nan"), float("inf")


def padded(value: float, *, sampled: bool = False) -> Any:
    """A policy with an unused row in its embedding table, which its own forward excludes from sampling."""
    model = tiny_llama(seed=11)
    with torch.no_grad():
        model.model.embed_tokens.weight[UNUSED, 3:] = value
    if not sampled:
        model.lm_head.register_forward_hook(
            lambda module, args, output: output.masked_fill(torch.arange(VOCAB) == UNUSED, -INF)
        )
    return model


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_drafts_of_an_unused_row_cost_drafts_only(value: float, verification: str) -> None:
    model = padded(value)
    options: dict[str, Any] = {"prompts": PROMPTS, "temperature": 1.0 if verification == "invariant" else 0.0}
    expected = generate(engine_of(model, speculation=False, verification=verification), **options)
    drafter = Interposing(expected.completion_ids, UNUSED, share=0.3)
    engine = fixed_on(model, drafter, 5, verification=verification)
    output = generate(engine, **options)
    assert output.completion_ids == expected.completion_ids
    assert not output.report.drafter_faults
    assert 0 < sum(output.report.accepted.values()) < sum(output.report.drafted.values())


@pytest.mark.parametrize("probs", [False, True])
def test_rejection_sampling_draws_on_with_them(probs: bool) -> None:
    """Tokens depend on the drafts here; that rejection stays exact is seen in `test_the_draft_itself_is_verified`."""
    model = padded(NAN)
    known = generate(engine_of(model, speculation=False), prompts=PROMPTS).completion_ids
    output = generate(
        fixed_on(model, Interposing(known, UNUSED, share=0.3, probs=probs), 5, verification="rejection"),
        prompts=PROMPTS,
    )
    assert not any(UNUSED in row for row in output.completion_ids)


def test_the_draft_itself_is_verified() -> None:
    tokens, lengths = np.array([4, UNUSED, 7, 5, 8, 8, UNUSED]), np.array([3, 3, 1])
    unrunnable = np.arange(VOCAB) == UNUSED
    unknown = stand_in(tokens, lengths, unrunnable)
    assert tokens.tolist() == [4, 4, 7, 5, 8, 8, UNUSED]  # a committed token stays as it is
    assert unknown.tolist() == [1, 2]  # row 0, which decides on the draft, is known


def test_a_policy_that_does_sample_it_ends_as_without_drafts() -> None:
    model = padded(NAN, sampled=True)
    with torch.no_grad():
        model.lm_head.weight[UNUSED] *= 40
    for engine in (
        engine_of(model, speculation=False),
        fixed_on(model, Interposing([[UNUSED] * 30] * 6, UNUSED, share=0.3), 3),
    ):
        with pytest.raises(NonFiniteLogits, match="Nothing was returned"):
            generate(engine, prompts=PROMPTS)


@pytest.mark.parametrize("make", [Fp4SelfSpeculator, lambda: DraftLM(tiny_llama(seed=12, layers=1), VOCAB)])
def test_drafters_that_run_their_own_drafts_leave_no_trace_in_the_cache(make: Any) -> None:
    model = padded(NAN)
    expected = generate(engine_of(model, speculation=False), prompts=PROMPTS)
    output = generate(fixed_on(model, make(), 4), prompts=PROMPTS)
    assert output.completion_ids == expected.completion_ids


def test_the_four_bit_copy_stops_where_it_drafts_one() -> None:
    model = padded(NAN)
    handle = model.lm_head.register_forward_hook(
        lambda module, args, output: output.masked_fill(torch.arange(VOCAB) == UNUSED, 1e4) if drafting else output
    )
    drafting: list[int] = []
    expected = generate(engine_of(model, speculation=False), prompts=PROMPTS)

    class Drafting(Fp4SelfSpeculator):
        def propose(self, *arguments: Any) -> Draft:
            drafting.append(1)
            try:
                return super().propose(*arguments)
            finally:
                drafting.clear()

    output = generate(fixed_on(model, Drafting(), 4), prompts=PROMPTS)
    handle.remove()
    assert sum(output.report.drafted.values())
    assert not sum(output.report.accepted.values())
    assert output.completion_ids == expected.completion_ids


@pytest.mark.parametrize("verifying", ["eager", "reference"])
@pytest.mark.parametrize("form", [DrafterInvariant, RejectionSampling])
def test_logits_behind_an_accepted_ending_token_are_not_reached(verifying: str, form: Any) -> None:
    for ends in (True, False):
        logits, draft, sequences, requests = case([2, 0], SamplingParams(max_new_tokens=8), with_probs=False)
        token = int(draft.token_ids[0, 0])
        params = SamplingParams(max_new_tokens=8, temperature=0.0, eos_token_ids=(token,) if ends else ())
        sequences.sampling = params
        logits[0, token] = 100.0
        logits[1] = NAN
        verifier = form() if verifying == "eager" else FusedVerifier(form(), "reference")
        if not ends:
            with pytest.raises(NonFiniteLogits):
                verifier.verify(logits, draft, sequences, requests)
            continue
        outcome = verifier.verify(logits, draft, sequences, requests)
        assert outcome.num_accepted[0] >= 1
        assert outcome.token_ids[0, 0] == token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_not_finite_are_found(dtype: torch.dtype) -> None:
    table = torch.randn(6, 4).to(dtype)
    assert rows_not_finite(table, 6) is None
    table[2, 1], table[5, 3] = NAN, -INF
    assert rows_not_finite(table, 5).tolist() == [False, False, True, False, False]
    assert rows_not_finite(table, 7).tolist() == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("unused", [[1, 47], [30, 13, 60, 43, 59]])
def test_the_probe_reads_no_unused_rows(unused: list[int]) -> None:
    model = tiny_llama(seed=11)
    with torch.no_grad():
        model.model.embed_tokens.weight[unused] = NAN
    InProcessRunner(model).check_reach(4)


def fixed_on(model: Any, speculator: Any, k: int, **options: Any) -> Any:
    controller = FixedController([speculator.name], speculator.name, k)
    return engine_of(model, speculators=[speculator], controller=controller, **options)
