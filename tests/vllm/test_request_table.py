"""Rows of an epoch of traffic: enough that most requests end in the epoch that they began in."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.core import SamplingParams
from atlas_rl.vllm.following import rows_of_epoch
from atlas_rl.vllm.request_table import Arrival, RequestTable

BATCH, PROMPT = 32, np.arange(5, dtype=np.int32)
SAMPLING = SamplingParams(max_new_tokens=200)


def enter(table: RequestTable, name: str) -> int | None:
    return table.enter(Arrival(name, len(PROMPT), SAMPLING, noise_key=1, request=None), PROMPT)


def test_a_request_that_outlives_several_batches_of_others_keeps_its_row() -> None:
    table = RequestTable(rows_of_epoch(BATCH, long=True), max_length=256, vocab_size=100)
    table.open(SAMPLING, policy_version=0)
    row = enter(table, "long")
    for turn in range(8):  # 31 rows each
        others = [f"{turn} {i}" for i in range(BATCH - 1)]
        assert not table.is_over()
        assert None not in [enter(table, name) for name in others]
        for name in others:
            table.leave(name)
    assert table.request_of == {"long": row}


@pytest.mark.parametrize(("batch", "rows"), [(1, 64), (32, 256), (256, 2048), (1024, 2048), (4096, 8192)])
def test_rows_are_bounded(batch: int, rows: int) -> None:
    assert rows_of_epoch(batch, long=True) == rows
    assert rows_of_epoch(batch) == max(64, 2 * batch)
