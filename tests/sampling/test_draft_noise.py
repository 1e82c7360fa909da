"""Under rejection verification every draft has noise of its own; coupled drafts have the policy's.

What was drafted and thrown away is learned from. Were its noise used again, the plan of the next step would know what that
step draws.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from atlas_kernels.noise import request_keys
from atlas_rl.core import SamplingParams, Sequences
from atlas_rl.speculators.drawing import Drawing
from tests.exact import FALSE_ALARM

REQUESTS, VOCAB, PROMPT = 20_000, 6, 3
Q = np.array([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])


def drawn(sequences, depth, couples_noise, token_ids):
    depths = np.full(REQUESTS, depth)
    device = torch.device("cpu")
    drawing = Drawing(
        "a", sequences, np.arange(REQUESTS), depths, device, couples_noise=couples_noise, token_ids=token_ids
    )
    for _ in range(depth):
        drawing.draw(torch.from_numpy(Q).log().float().repeat(REQUESTS, 1))
    return drawing.finish(depths).token_ids


def reduced(sequences, depth, couples_noise):
    return drawn(sequences, depth, couples_noise, torch.arange(VOCAB))


def full(sequences, depth, couples_noise):
    return drawn(sequences, depth, couples_noise, None)


def drawn_twice(draw, couples_noise):
    """Tokens of one position: as the second of a draft, and as the first of the next step's draft."""
    lengths = np.full(REQUESTS, PROMPT)
    sequences = Sequences(
        token_ids=np.zeros((REQUESTS, 16), np.int32),
        lengths=lengths,
        prompt_lengths=lengths.copy(),
        prompt_keys=np.zeros(REQUESTS, np.int64),
        noise_keys=request_keys(7, REQUESTS),
        sampling=SamplingParams(max_new_tokens=8, temperature=1.0),
        vocab_size=VOCAB,
        policy_version=0,
    )
    thrown_away = draw(sequences, 2, couples_noise)[:, 1]
    sequences.lengths += 1  # the step committed one token, another than the draft's first
    return thrown_away, draw(sequences, 1, couples_noise)[:, 0]


@pytest.mark.parametrize("draw", [reduced, full])
def test_a_position_that_is_drafted_again_is_drawn_independently_under_rejection(draw):
    first, second = drawn_twice(draw, couples_noise=False)
    pairs = np.zeros((VOCAB, VOCAB))
    np.add.at(pairs, (first, second), 1)
    # Independence and both marginals at once: a cell of the table is the product of its two probabilities.
    assert stats.chisquare(pairs.ravel(), np.outer(Q, Q).ravel() * REQUESTS).pvalue > FALSE_ALARM


@pytest.mark.parametrize("draw", [reduced, full])
def test_a_coupled_draft_has_the_policys_noise_whenever_it_is_drawn(draw):
    first, second = drawn_twice(draw, couples_noise=True)
    assert (first == second).all()
    assert stats.chisquare(np.bincount(first, minlength=VOCAB), Q * REQUESTS).pvalue > FALSE_ALARM
