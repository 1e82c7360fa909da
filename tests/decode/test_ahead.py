"""What becomes of drafts that were queued for the requests of the step before."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.base import Step
from atlas_rl.decode.ahead import of_active
from atlas_rl.decode.checked import checked_plan, checked_plan_ahead


@pytest.mark.parametrize("seed", range(20))
def test_every_request_gets_its_own_row_within_its_room(seed):
    rng = np.random.default_rng(seed)
    former, requests = (rng.permutation(12)[: rng.integers(1, 10)] for _ in range(2))
    width, num_tokens = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    tokens = rng.integers(0, 99, (len(former), width))
    sure = rng.random((len(former), width)).astype(np.float32)
    lengths, room = rng.integers(0, width + 1, len(former)), rng.integers(0, 5, len(requests))
    asked, own_tokens, own_sure, own_lengths, anybody = of_active(
        former, np.full(12, -1), requests, room, num_tokens, tokens, sure, lengths
    )
    rows = {request: row for row, request in enumerate(former.tolist())}
    for row, request in enumerate(requests.tolist()):
        if request not in rows:
            assert asked[row] == own_lengths[row] == 0
            continue
        assert asked[row] == min(num_tokens, room[row])
        assert own_lengths[row] == min(lengths[rows[request]], room[row])
        assert own_tokens[row].tolist() == tokens[rows[request]].tolist()
        assert own_sure[row].tolist() == sure[rows[request]].tolist()
    assert anybody == asked.any()


def test_plans_that_ask_what_cannot_be_asked_are_refused():
    step = Step(np.array([3, 3]), 10, ["history", "head"], ahead=("head",))
    assert list(checked_plan({"history": np.array([1, 2])}, step)) == ["history"]
    with pytest.raises(ValueError, match="drafts ahead"):
        checked_plan({"head": np.array([1, 2])}, step)
    assert checked_plan_ahead({"head": 3}, ("head",)) == {"head": 3}
    with pytest.raises(ValueError, match="does not draft ahead"):
        checked_plan_ahead({"history": 3}, ("head",))
    for wrong in (0, 2.5, None):
        with pytest.raises(ValueError, match="number of tokens from 1 on"):
            checked_plan_ahead({"head": wrong}, ("head",))
