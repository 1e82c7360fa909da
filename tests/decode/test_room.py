"""Compiled room of active requests against its numpy form."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.decode.room import LOOKAHEAD, needed_by, rest_of, room_of


@pytest.mark.parametrize("held", [5, 40, 1 << 62])
def test_room_is_what_limits_and_rows_leave(held: int) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 9)
    max_lengths, active = lengths + rng.integers(1, 30, 9), rng.permutation(9)[:6]
    room = np.minimum(max_lengths[active] - 1, held) - lengths[active]
    assert np.array_equal(room_of(active, lengths, max_lengths, held), room)
    generated, left = rest_of(active, lengths, lengths - 1, max_lengths)
    assert np.array_equal(generated, np.ones(6))
    assert np.array_equal(left, (max_lengths - lengths)[active])
    needed = min(lengths[active].max() + LOOKAHEAD, max_lengths[active].max())
    assert needed_by(active, lengths, max_lengths) == needed
