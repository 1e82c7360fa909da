"""Requests that end without a forward that says so: by a stop string, or because their client has left."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.fixed import NoSpeculation
from atlas_rl.core import Needs, SamplingParams, Sequences, Verified
from atlas_rl.vllm.drafting import Drafting
from atlas_rl.vllm.request_table import Arrival
from tests.drafters import RandomDrafter


class Noting(RandomDrafter):
    """Notes which requests have finished."""

    def __init__(self, needs: Needs) -> None:
        super().__init__()
        self.needs, self.finished = needs, []

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        self.finished += verified.requests[verified.finished].tolist()


@pytest.mark.parametrize(
    ("needs", "told"), [(Needs(), True), (Needs(layers=(1,)), True), (Needs(layers=(1,), head_inputs=True), False)]
)
def test_drafters_that_keep_something_for_a_request_hear_of_it(needs: Needs, told: bool) -> None:
    drafting, drafter = Drafting(3, 256, 4, 100), Noting(needs)
    drafting.use({"random": drafter}, NoSpeculation())
    table, sampling = drafting.requests.table, SamplingParams(max_new_tokens=9)
    table.open(sampling, policy_version=0)
    rows = {name: table.enter(Arrival(name, 2, sampling, 1, None), np.arange(2, dtype=np.int32)) for name in "ab"}
    drafting.forget({"b", "nobody"})
    assert drafter.finished == ([rows["b"]] if told else [])
    assert table.request_of == {"a": rows["a"]}
