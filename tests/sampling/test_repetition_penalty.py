"""The repetition penalty of all rows at once is that of every row by itself, in verification, drafting and audit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl.audit.scores import _Rows
from atlas_rl.core import Draft, SamplingParams, Sequences
from atlas_rl.sampling.processing import padded_prefixes, process
from atlas_rl.sampling.verification import prefixes_of
from atlas_rl.speculators.drawing import Drawing
from tests.verification import case

CPU = torch.device("cpu")
VOCAB = 300


def row_by_row(logits: torch.Tensor, penalty: float, prefixes: list[np.ndarray]) -> torch.Tensor:
    """The formula as its paper has it, arXiv 1909.05858."""
    out = logits.clone()
    for row, prefix in zip(out, prefixes, strict=True):
        tokens = torch.from_numpy(np.unique(prefix)).long()
        seen = row[tokens]
        row[tokens] = torch.where(seen < 0, seen * penalty, seen / penalty)
    return out


def penalised(penalty: float, **options: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=9, repetition_penalty=penalty, temperature=1.0, **options)


def ragged(lengths: list[int], sampling: SamplingParams) -> Sequences:
    """Requests whose texts repeat their tokens, and end at different places; behind them the array holds anything."""
    _, _, sequences, _ = case([0] * len(lengths), sampling, with_probs=False)
    sequences.token_ids[:] = np.random.default_rng(3).integers(0, 12, size=sequences.token_ids.shape)
    sequences.lengths[::2] = lengths
    return sequences


@pytest.mark.parametrize("penalty", [0.7, 1.3, 1e-10, 1e10])
def test_every_row_has_its_own_prefix(penalty):
    rng = np.random.default_rng(1)
    texts = rng.integers(0, 30, size=(3, 25)).astype(np.int32)
    rows, ends = np.array([2, 0, 0, 1, 2]), np.array([25, 1, 24, 7, 3])
    logits = 4 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[:, 5], logits[:, 6] = float("-inf"), float("nan")
    expected = row_by_row(logits, penalty, [texts[row, :end] for row, end in zip(rows, ends, strict=True)])
    ours = process(logits.clone(), penalised(penalty), padded_prefixes(texts, rows, ends, CPU))
    assert torch.equal(ours.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert not torch.equal(ours.nan_to_num(nan=7.0), logits.nan_to_num(nan=7.0))


@pytest.mark.parametrize("lengths", [[1, 9, 40], [6, 6, 6]])
def test_prefixes_have_what_is_committed_and_then_the_drafts_before_the_position(lengths):
    sequences = ragged(lengths, penalised(1.3))
    sequences.reserve(44)
    requests = 2 * np.arange(3)
    draft = Draft(100 + np.arange(9).reshape(3, 3), np.array([3, 0, 2]), np.full((3, 3), 0.5, np.float32))
    going = np.array([0, 0, 0, 0, 1, 2, 2, 2])
    depths = np.array([0, 1, 2, 3, 0, 0, 1, 2])
    for some in (slice(None), slice(0, 1), slice(5, 8), slice(4, 5)):
        found = prefixes_of(sequences, requests[going[some]], draft, going[some], depths[some], CPU)
        assert found is not None
        for prefix, row, depth in zip(found, going[some], depths[some], strict=True):
            committed = sequences.token_ids[requests[row], : lengths[row]].tolist()
            assert set(prefix.tolist()) == {*committed, *draft.token_ids[row, :depth].tolist()}
    sequences.sampling = penalised(1.0)
    assert prefixes_of(sequences, requests, draft, np.arange(3), np.zeros(3, np.int64), CPU) is None


@pytest.mark.parametrize("couples_noise", [True, False])
def test_drafted_tokens_are_of_the_prefix_too(couples_noise):
    """Rows that go on have their own texts and drafts, also where others stop before them."""
    sequences, depths = ragged([4, 11, 7], penalised(1.8)), np.array([3, 1, 2])
    requests = 2 * np.arange(3)
    drawing = Drawing("a", sequences, requests, depths, CPU, couples_noise=couples_noise)
    drafted: list[list[int]] = [[], [], []]
    seen = []
    for rows in drawing.rows:
        logits = 3 * torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(len(rows)))
        prefixes = [
            [*sequences.token_ids[requests[row], : sequences.lengths[requests[row]]], *drafted[row]] for row in rows
        ]
        expected = row_by_row(logits, 1.8, [np.array(prefix, np.int64) for prefix in prefixes])
        assert torch.equal(drawing._processed(logits.clone()), expected)
        drawing.draw(logits)
        seen.append(drawing._indices[-1].tolist())
        for row, token in zip(rows, seen[-1], strict=True):
            drafted[row].append(token)
    draft = drawing.finish(depths)
    assert [draft.token_ids[row, :n].tolist() for row, n in enumerate(depths)] == drafted
    assert draft.lengths.tolist() == depths.tolist()


def test_the_audit_penalises_what_was_before_each_token():
    tokens = torch.tensor([4, 4, 9, 250, 4, 9, 77])
    places, raw = torch.arange(2, 7), torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(2))
    rows = _Rows(raw, tokens, places, penalised(1.4), None)  # type: ignore[arg-type]
    expected = row_by_row(raw, 1.4, [tokens[:place].numpy() for place in places.tolist()])
    assert torch.equal(rows.log_probs, expected.log_softmax(dim=-1))
