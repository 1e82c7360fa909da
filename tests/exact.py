"""Whole-sequence exactness: enumerate a tiny policy's distribution, and test samples against it.

Chi-square over whole sequences; cells with less than five expected samples are pooled. The seeds are fixed, so a test
either passes for good or fails for good; over fresh seeds each comparison would raise a false alarm with probability
`FALSE_ALARM`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from transformers import PreTrainedModel

from atlas_rl.core import SamplingParams
from atlas_rl.sampling.processing import process

FALSE_ALARM = 1e-4
CERTAIN = 1e-9  # p-value that a biased sampler must fall below


def sequence_probabilities(
    model: PreTrainedModel, prompt: Sequence[int], sampling: SamplingParams
) -> dict[tuple[int, ...], float]:
    """Probability of every completion of `prompt`, from plain forward passes and the processed distribution."""
    finished: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(sampling.max_new_tokens):
        prefixes = list(open_)
        tokens = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        with torch.no_grad():
            logits = model(tokens).logits[:, -1].float()
        probs = process(logits, sampling, tokens).softmax(dim=-1).double()
        grown: dict[tuple[int, ...], float] = {}
        for prefix, row in zip(prefixes, probs.tolist(), strict=True):
            for token, p in enumerate(row):
                if p > 0:
                    target = finished if token in sampling.eos_token_ids else grown
                    target[(*prefix, token)] = open_[prefix] * p
        open_ = grown
    return finished | open_


def p_value(samples: Sequence[Sequence[int]], expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square p-value of `samples` under `expected`; a sample of probability zero gives 0."""
    counts = Counter(tuple(sample) for sample in samples)
    if any(sample not in expected for sample in counts):
        return 0.0
    total = sum(expected.values())
    assert abs(total - 1) < 1e-4, f"enumeration sums to {total}"
    observed = np.array([counts[sequence] for sequence in expected], dtype=float)
    wanted = np.array(list(expected.values())) / total * len(samples)
    small = wanted < 5
    if small.any():
        observed = np.append(observed[~small], observed[small].sum())
        wanted = np.append(wanted[~small], wanted[small].sum())
    if wanted[-1] < 5:  # the pool itself is small: join it to the least of the others
        observed[-2], wanted[-2] = observed[-2] + observed[-1], wanted[-2] + wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    return float(stats.chisquare(observed, wanted).pvalue)
