"""Drafts of several speculators become one, with what each was drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_rl.controller.base import Admission
from atlas_rl.core import Draft
from atlas_rl.decode.propose import merge

VOCAB, BATCH = 7, 4
NAMES = ["a", "b"]


def drawn(width: int, seed: int) -> Draft:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(BATCH, width, VOCAB, generator=generator).softmax(dim=-1)
    tokens = probs.argmax(dim=-1).numpy()
    return Draft(tokens, np.full(BATCH, width), np.full((BATCH, width), 0.5, np.float32), probs, probs_are_checked=True)


def certain(width: int) -> Draft:
    tokens = np.arange(BATCH)[:, None] + np.arange(width)
    return Draft(tokens, np.full(BATCH, width), np.full((BATCH, width), 0.9, np.float32))


def admitted(drafters: list[int], lengths: list[int]) -> Admission:
    return Admission(np.array(drafters), np.array(lengths))


def test_probabilities_of_one_speculator_are_not_copied() -> None:
    a = drawn(3, 0)
    merged = merge({"a": a, "b": drawn(3, 1)}, NAMES, admitted([0, 1, 0, 0], [2, 0, 1, 2]), VOCAB)
    assert a.draft_probs is not None
    assert merged.draft_probs is not None
    assert merged.draft_probs.shape == (BATCH, 2, VOCAB)
    assert merged.draft_probs.data_ptr() == a.draft_probs.data_ptr()
    assert torch.equal(merged.draft_probs[0], a.draft_probs[0, :2])


def test_every_request_has_those_of_its_own_speculator() -> None:
    a, b = drawn(3, 0), drawn(2, 1)
    merged = merge({"a": a, "b": b}, NAMES, admitted([0, 1, 1, 0], [3, 2, 1, 0]), VOCAB)
    assert merged.draft_probs is not None
    assert a.draft_probs is not None
    assert b.draft_probs is not None
    assert torch.equal(merged.draft_probs[0], a.draft_probs[0])
    assert torch.equal(merged.draft_probs[1:3, :2], b.draft_probs[1:3])
    assert merged.token_ids[0].tolist() == a.token_ids[0].tolist()


def test_beside_drawn_drafts_certain_ones_are_one_hot() -> None:
    a, b = drawn(3, 0), certain(3)
    merged = merge({"a": a, "b": b}, NAMES, admitted([0, 1, 1, 0], [3, 2, 1, 1]), VOCAB)
    assert merged.draft_probs is not None
    for row, length in ((1, 2), (2, 1)):
        for place in range(length):
            assert merged.draft_probs[row, place].argmax() == b.token_ids[row, place]
            assert merged.draft_probs[row, place].sum() == 1


class Made(TorchDispatchMode):
    """Sums the bytes of what operators return."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and not func.is_view and all(result is not each for each in args):
            self.num_bytes += result.nbytes
        return result


def test_certain_drafts_take_no_memory_over_the_vocabulary() -> None:
    vocab, nothing = (
        1000,
        Draft(np.zeros((BATCH, 3), np.int64), np.full(BATCH, 3), np.full((BATCH, 3), 0.5, np.float32)),
    )
    nothing.draft_probs = torch.zeros(BATCH, 0, vocab)
    with Made() as made:
        merged = merge({"a": nothing, "b": certain(3)}, NAMES, admitted([0, 1, 1, 1], [3, 2, 1, 1]), vocab)
    assert merged.draft_probs is not None
    assert made.num_bytes < 1.1 * merged.draft_probs.nbytes


def test_certain_drafts_alone_have_no_probabilities() -> None:
    merged = merge({"a": drawn(3, 0), "b": certain(3)}, NAMES, admitted([1, 1, 0, 1], [3, 2, 0, 1]), VOCAB)
    assert merged.draft_probs is None
    assert merged.token_ids[0].tolist() == [0, 1, 2]


def test_rows_of_a_draft_keep_what_was_seen_of_them() -> None:
    a = drawn(2, 0)
    part = a.of(np.array([3, 1]))
    assert a.draft_probs is not None
    assert part.draft_probs is not None
    assert torch.equal(part.draft_probs, a.draft_probs[[3, 1]])
    wide = part.spread(np.array([0, 2]), 3)
    assert wide.draft_probs is not None
    assert torch.equal(wide.draft_probs[[0, 2]], part.draft_probs)
    assert part.probs_are_checked
    assert wide.probs_are_checked
