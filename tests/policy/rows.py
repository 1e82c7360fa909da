"""Rows of a cache that are run in every way there is, each forward held against plain ones."""

from __future__ import annotations

import numpy as np
import torch

from atlas_rl.policy.base import Segments
from atlas_rl.policy.in_process import InProcessRunner

VOCAB, LENGTH = 64, 24
TOLERANCE = 5e-4  # float32, logits that spread by two nats


def texts(rows, length=LENGTH, seed=0):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)).numpy()


@torch.no_grad()
def plain_logits(model, tokens):
    return model(input_ids=torch.as_tensor(tokens)[None], use_cache=False).logits[0].float()


class Rows:
    """Five rows of a cache, and what plain forwards give for them.

    Every forward is held against those, at all tokens that are not drafts.
    """

    def __init__(self, model):
        self.runner = InProcessRunner(model)
        self.model, self.cache = model, self.runner.new_cache(5, 2 * LENGTH)
        self.texts = {}

    def forward(self, news, *, rejected=(), settled=None):
        """Append tokens to rows, `{row: tokens}`, and so many random ones to each that the next forward replaces."""
        rows, rng = np.array(list(news)), np.random.default_rng(len(self.texts) + sum(map(len, news.values())))
        starts = np.array([len(self.texts.get(row, ())) for row in rows])
        junk = list(rejected) or [0] * len(rows)
        packed = [[*news[row], *rng.integers(3, VOCAB, count)] for row, count in zip(rows, junk, strict=True)]
        lengths = np.array(list(map(len, packed)))
        segments = Segments(np.concatenate(packed).astype(np.int64), 0, starts, lengths, rows, settled=settled)
        logits = self.runner.forward(segments, np.arange(lengths.sum())).split(lengths.tolist())
        for row, start, got in zip(rows.tolist(), starts, logits, strict=True):
            self.texts[row] = [*self.texts.get(row, ()), *news[row]]
            expected = plain_logits(self.model, self.texts[row])[start:]
            assert (got[: len(expected)] - expected).abs().max() < TOLERANCE

    def copy(self, source, targets):
        self.runner.copy_rows(source, targets, len(self.texts[source]))
        self.texts |= {target: list(self.texts[source]) for target in targets}


def run_in_every_way(rows):
    """Prompts whole and in chunks, groups, ragged drafts of which some are rejected, rows that move, end and begin anew."""
    a, b, c, d = texts(4)
    with rows.runner.session(rows.cache):
        rows.forward({3: a[:9], 0: b[:2], 1: c[:1]}, settled=np.array([9, 2, 1]))
        rows.forward({3: a[9:14]}, settled=np.array([14]))  # a prompt in chunks
        rows.copy(3, [2, 4])  # a group
        rows.forward({0: b[2:5], 1: c[1:2], 2: d[:2], 3: a[14:15], 4: d[3:7]}, rejected=[0, 4, 2, 0, 1])
        rows.forward({4: d[7:8], 2: d[8:12]}, rejected=[3, 3])  # some of the rows, and not in their order
        rows.copy(4, [0])  # a gap is filled, with drafts still to be dropped
        for step in range(3):
            rows.forward({0: b[5 + step : 6 + step], 1: c[2 + step : 3 + step], 2: d[12 + step : 13 + step]})
        rows.texts[1] = []  # another request
        rows.forward({2: d[15:18], 1: a[:6]}, rejected=[2, 3])
        rows.forward({1: a[6:8], 2: d[18:19]}, rejected=[0, 1])
