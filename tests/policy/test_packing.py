"""Packed copies of weights in a whole call: what the report says of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atlas_rl.decode.plain_run import PlainCosts, PlainForwards
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.linear_routes import MIN_BYTES, PACKED, TURNED, RouteTable, packed_type
from atlas_rl.rollout import engine as engine_module
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.engines import engine_of, generate
from tests.models import tiny_llama
from tests.routes import table_where

pytestmark = pytest.mark.skipif(packed_type(torch.float32) is None, reason="this torch has no packed linear layers")


def test_the_report_of_a_call_has_the_seconds_and_bytes_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(hidden=256, heads=4, kv_heads=4)
    large = [m.weight for m in model.modules() if class_of(m) is nn.Linear and 4 * m.weight.numel() >= MIN_BYTES]
    found = {}
    for route in (PACKED, TURNED):
        table = table_where(route)
        monkeypatch.setattr(RouteTable, "of_this_machine", lambda table=table: table)
        output = generate(engine_of(model, speculation=False))
        found[route] = output.completion_ids
        report = output.report
        assert report.packed_bytes == (sum(4 * weight.numel() for weight in large) if route == PACKED else 0)
        assert (report.packing_s > 0) == (route == PACKED)
        assert report.packing_s < report.prefill_s + report.forward_s
    assert found[PACKED] == found[TURNED]


def test_an_estimate_packs_where_plain_forwards_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = tiny_llama(hidden=256, heads=4, kv_heads=4), []
    monkeypatch.setattr(PlainCosts, "run", lambda *arguments, **options: PlainForwards(5, 100.0))
    monkeypatch.setattr(engine_module, "no_speculation_seconds", lambda report, count, s, **options: told.append(s))
    for route in (PACKED, TURNED):
        table = table_where(route)
        monkeypatch.setattr(RouteTable, "of_this_machine", lambda table=table: table)
        report = generate(engine_of(model, speculators=[HistorySpeculator()], audit_share=0.0)).report
        assert told[-1] <= 100.0 + report.packing_s
    assert told[0] > told[1] == 100.0
