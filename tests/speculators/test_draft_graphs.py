"""Drafts of fixed shapes, called plainly: the tokens of drafts of any shape, few shapes, and weights that stay in place."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from atlas_kernels.noise import Stream
from atlas_kernels.truncation import Truncation
from atlas_rl.core import SamplingParams
from atlas_rl.rollout.requests import build_sequences
from atlas_rl.speculators.head_sampling import HeadSampling
from atlas_rl.speculators.recurrent import draft_graphs
from atlas_rl.speculators.recurrent import speculator as recurrent
from atlas_rl.speculators.recurrent.draft_graphs import LENGTHS, ROWS, DraftGraphs, cleared
from atlas_rl.speculators.recurrent.head import FoldedHead
from tests.drafters import recurrent_drafter
from tests.recurrent import draft_inputs, policy, random_head, trained

HIDDEN, TOKENS, VOCAB, REQUESTS = 24, 40, 500, 7
SAMPLINGS = {
    "sampled": HeadSampling(0.8, None, Stream.TARGET, False),
    "greedy": HeadSampling(0.0, None, Stream.TARGET, False),
    "with probabilities": HeadSampling(1.0, None, Stream.DRAFT, True),
    "truncated": HeadSampling(0.9, Truncation(top_k=12, top_p=0.9), Stream.DRAFT, True),
}


def folded(seed, former=None, tokens=TOKENS, dtype=torch.float32):
    """A folded head and its packed weights."""
    head = FoldedHead(random_head(seed, tokens), former)
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:tokens]
    return head, head.packed(ids, dtype)


def states_of(seed=0):
    return torch.randn(REQUESTS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def inputs_of(batch, seed=0):
    return draft_inputs(batch, seed, requests=REQUESTS, tokens=TOKENS)


def assert_drawn(graphs, head, weights, states, inputs, length, sampling):
    """`graphs` draft what the head drafts at exactly this shape."""
    found = graphs.run(head, weights, states, inputs, length, sampling)
    requests, keys, positions, newest = torch.from_numpy(inputs)
    with torch.no_grad():
        drawn = sampling.draw(weights, head.begin(states[requests]), newest, keys, positions, length)
    assert np.array_equal(found.token_ids, weights.token_ids[drawn.indices].numpy())
    np.testing.assert_allclose(found.max_probs, drawn.confidence.numpy(), rtol=1e-5)
    assert (found.probs is None) == (drawn.probs is None)
    if found.probs is not None:
        torch.testing.assert_close(found.probs, drawn.probs, rtol=1e-5, atol=1e-7)
    queued = graphs.queue(head, weights, states, torch.from_numpy(inputs), length, sampling)()
    assert np.array_equal(queued.token_ids, found.token_ids)
    assert np.array_equal(queued.max_probs, found.max_probs)
    return found


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 3), (5, 2), (16, 5), (17, 17), (600, 3)])
def test_padding_changes_no_draft(name, batch, length):
    head, weights = folded(0)
    graphs = DraftGraphs(capture=False)
    for seed in range(2):  # other keys, positions and tokens at the same shape
        inputs = inputs_of(batch, seed)
        assert_drawn(graphs, head, weights, states_of(seed), inputs, length, SAMPLINGS[name])
    assert len(graphs._shapes) == (batch <= ROWS[-1] and length <= LENGTHS[-1])


def test_drafts_of_many_sizes_have_few_shapes():
    head, weights = folded(0)
    graphs, states = DraftGraphs(capture=False), states_of()
    for batch in range(1, 41):
        graphs.run(head, weights, states, inputs_of(batch), 1 + batch % 8, SAMPLINGS["sampled"])
    assert {key[0] for key in graphs._shapes} == {1, 2, 4, 8, 16, 32, 64}
    assert {key[1] for key in graphs._shapes} <= {1, 2, 4, 6, 8}
    for sizes in (np.array(ROWS), np.array(LENGTHS)):
        wanted = np.arange(1, sizes[-1] + 1)
        assert (sizes[np.searchsorted(sizes, wanted)] < 2 * wanted).all()


def test_the_number_of_shapes_is_bounded(monkeypatch):
    monkeypatch.setattr(draft_graphs, "_MOST_SHAPES", 2)
    head, weights = folded(0)
    graphs, states = DraftGraphs(capture=False), states_of()
    for batch in (1, 2, 3, 1):
        assert_drawn(graphs, head, weights, states, inputs_of(batch), 2, SAMPLINGS["sampled"])
    assert {key[0] for key in graphs._shapes} == {1, 2}
    graphs.begin_call()  # whose shapes may be others
    assert_drawn(graphs, head, weights, states, inputs_of(3), 2, SAMPLINGS["sampled"])
    assert {key[0] for key in graphs._shapes} == {4}
    graphs.begin_call()
    assert graphs._shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fold_of_equal_sizes_is_written_where_the_one_before_it_was(dtype):
    first, weights = folded(0, dtype=dtype)
    names = [field.name for field in fields(weights)]
    before = {name: getattr(weights, name).data_ptr() for name in names}, first.read.data_ptr()
    second, again = folded(1, first, dtype=dtype)
    assert ({name: getattr(again, name).data_ptr() for name in names}, second.read.data_ptr()) == before
    fresh, alone = folded(1, dtype=dtype)
    assert all(torch.equal(getattr(again, name), getattr(alone, name)) for name in names)
    assert torch.equal(second.read, fresh.read)
    _, grown = folded(2, second, tokens=TOKENS + 1, dtype=dtype)
    assert grown.outputs.data_ptr() != before[0]["outputs"]
    assert torch.equal(grown.outputs, folded(2, tokens=TOKENS + 1, dtype=dtype)[1].outputs)


def test_shapes_last_as_long_as_what_a_graph_would_read_is_in_its_place():
    graphs, states = DraftGraphs(capture=False), states_of()
    first, weights = folded(0)

    def shape_after(head, weights, states):
        assert_drawn(graphs, head, weights, states, inputs_of(3), 2, SAMPLINGS["sampled"])
        (shape,) = graphs._shapes.values()
        return shape

    before = shape_after(first, weights, states)
    second, weights = folded(1, first)
    assert shape_after(second, weights, states) is before
    assert shape_after(second, weights, cleared(states, REQUESTS)) is before
    states = states.clone()
    moved = shape_after(second, weights, states)
    assert moved is not before
    assert shape_after(*folded(2, second, tokens=TOKENS + 1), states) is not moved


def test_a_table_of_states_is_kept_where_its_size_suits():
    states = torch.ones(8, HIDDEN)
    assert cleared(states, 5) is states
    assert not states.any()
    assert cleared(states, 9).shape == (9, HIDDEN)
    assert cleared(states, 1).shape == (1, HIDDEN)  # not the room of eight for one


def test_a_call_in_inference_mode_leaves_nothing_that_a_later_call_cannot_write_into():
    heads, ids, graphs = (
        (random_head(0, TOKENS), random_head(1, TOKENS)),
        torch.arange(TOKENS),
        DraftGraphs(capture=False),
    )
    with torch.inference_mode():
        states = cleared(torch.zeros(0, HIDDEN), REQUESTS)
        first = FoldedHead(heads[0])
        graphs.run(first, first.packed(ids, torch.float32), states, inputs_of(3), 2, SAMPLINGS["sampled"])
    second = FoldedHead(heads[1], first)
    weights = second.packed(ids, torch.float32)
    assert_drawn(graphs, second, weights, cleared(states, REQUESTS), inputs_of(3), 2, SAMPLINGS["sampled"])
    assert torch.is_grad_enabled()
    assert not weights.outputs.requires_grad


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_rows_are_cut_where_less_is_wanted(verification, monkeypatch):
    """As where the head draws token by token, on a CPU."""
    speculator = recurrent_drafter()
    trained(policy(), speculator, updates=1, verification=verification)
    sampling = SamplingParams(max_new_tokens=8, temperature=0.8, eos_token_ids=(17,))
    sequences, _ = build_sequences([[5, 9, 2], [7], [3, 3, 8], [5, 4]], 2, sampling, 64, None, 1)
    speculator.start(sequences, np.arange(8))
    requests, most = np.array([6, 0, 3, 1, 5]), np.array([3, 1, 5, 0, 4])
    by_steps = speculator.propose(sequences, requests, most)
    monkeypatch.setattr(recurrent, "kernels_run_on", lambda device: True)
    at_once = speculator.propose(sequences, requests, most)
    assert at_once.lengths.tolist() == by_steps.lengths.tolist()
    assert (at_once.lengths <= most).all()
    assert at_once.lengths.any()
    assert at_once.probs_are_checked
    for row, length in enumerate(at_once.lengths):
        assert at_once.token_ids[row, :length].tolist() == by_steps.token_ids[row, :length].tolist()
    np.testing.assert_allclose(at_once.confidence, by_steps.confidence, rtol=1e-4)
    assert (at_once.draft_probs is None) == (verification == "invariant")
    if at_once.draft_probs is not None:
        torch.testing.assert_close(at_once.draft_probs, by_steps.draft_probs, rtol=1e-4, atol=1e-6)
