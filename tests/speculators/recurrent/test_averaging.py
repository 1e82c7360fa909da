"""The mean of several ranks' recurrent heads: weights alike, biases by token, and who counts in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl.speculators.recurrent.averaging import summand, take_mean
from atlas_rl.speculators.recurrent.head import RecurrentHead

VOCAB = 10


def head(ids: list[int], seed: int) -> tuple[RecurrentHead, np.ndarray]:
    """A head over some tokens, whose biases are ten times `seed` and the token's id."""
    made = RecurrentHead(hidden_size=8, state_size=4, seed=seed)
    made.bias.data = torch.tensor([10.0 * seed + token for token in ids])
    return made, np.array(ids)


def weights(of: RecurrentHead) -> list[torch.Tensor]:
    return [parameter.detach().clone() for name, parameter in of.named_parameters() if name != "bias"]


def total(*parts: torch.Tensor) -> torch.Tensor:
    return torch.stack(parts).sum(dim=0)


def test_ranks_get_one_head_and_each_token_the_mean_of_those_who_know_it() -> None:
    (first, ids), (second, others) = head([2, 3, 5], 1), head([3, 5, 7], 2)
    before = [weights(first), weights(second)]
    summed = total(summand(first, ids, VOCAB, learned=True), summand(second, others, VOCAB, learned=True))
    assert take_mean(first, ids, summed)
    assert take_mean(second, others, summed)
    for a, b, *old in zip(weights(first), weights(second), *before, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, (old[0] + old[1]) / 2)
    assert first.bias.tolist() == [12.0, 18.0, 20.0]
    assert second.bias.tolist() == [18.0, 20.0, 27.0]


@pytest.mark.parametrize("left_out", ["not learned", "not finite"])
def test_a_rank_that_has_nothing_to_give_takes_what_the_others_have(left_out: str) -> None:
    (first, ids), (second, others) = head([2, 3], 1), head([3, 9], 2)
    if left_out == "not finite":
        second.cell.weight_hh.data[0, 0] = torch.nan
    learned = left_out != "not learned"
    summed = total(summand(first, ids, VOCAB, learned=True), summand(second, others, VOCAB, learned=learned))
    assert take_mean(second, others, summed)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    assert second.bias.tolist() == [13.0, 29.0], "nobody's part has token 9: its bias stays"


def test_nothing_changes_where_no_rank_has_learned() -> None:
    first, ids = head([2, 3], 1)
    before = weights(first)
    assert not take_mean(first, ids, 2 * summand(first, ids, VOCAB, learned=False))
    assert all(torch.equal(a, b) for a, b in zip(weights(first), before, strict=True))
    assert first.bias.tolist() == [12.0, 13.0]
