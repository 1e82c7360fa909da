"""Contests of the routes of linear layers on a CPU: the fastest wins, what packing takes is known, and both are kept."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from atlas_rl.policy import cpu_linear, group_products, linear_routes
from atlas_rl.policy.cpu_linear import FastLinears
from atlas_rl.policy.linear_routes import (
    BUCKETS,
    DOUBLED,
    PACKED,
    PLAIN,
    ROUTES,
    TURNED,
    WIDENED,
    Contest,
    RouteTable,
    packed_type,
    widened,
)
from tests.policy.linears import BF16, FP16, INPUTS, OUTPUTS, close, layer_of
from tests.routes import table_where

needs_packing = pytest.mark.skipif(packed_type(torch.float32) is None, reason="this torch has no packed linear layers")


def test_routes_take_turns_until_one_has_won() -> None:
    costs = {PLAIN: 3.0, TURNED: 1.0, DOUBLED: 1.2, PACKED: 1.4}
    contest = Contest({name: [] for name in costs})
    tries = []
    while contest.winner is None:
        route = contest.next(may_pack=True)
        tries.append(route)
        contest.note(route, costs[route] * (10 if tries.count(route) == 1 else 1))  # the first time is not typical
    assert (contest.winner, contest.runner_up) == (TURNED, TURNED)
    assert {name: tries.count(name) for name in costs} == {PLAIN: 2, TURNED: 4, DOUBLED: 4, PACKED: 4}
    assert contest.gain_s == 0


def test_a_timing_that_rules_out_several_routes_at_once_ends_the_contest() -> None:
    contest = Contest({PLAIN: [1.0, 1.0, 1.0], TURNED: [1.1, 1.1, 1.1], WIDENED: [0.9, 0.9, 0.9]})
    contest.note(PLAIN, 1.0)
    contest.note(WIDENED, 0.1)
    assert (contest.winner, contest.runner_up) == (WIDENED, WIDENED)


def test_a_contest_that_only_packed_copies_kept_open_ends_without_memory_for_them() -> None:
    for num_timings, winner in ((4, TURNED), (1, None)):
        contest = Contest({PLAIN: [1.0, 1.0], TURNED: [0.5] * num_timings, PACKED: []})
        contest.leave_out_packed()
        assert contest.winner == winner


def test_layers_without_a_copy_leave_that_route_to_others() -> None:
    contest = Contest({PLAIN: [], TURNED: [], PACKED: []})
    for _ in range(20):
        route = contest.next(may_pack=False)
        contest.note(route, {PLAIN: 2.0, TURNED: 1.9}[route])
    assert contest.winner is None
    while contest.winner is None:
        contest.note(contest.next(may_pack=True), 0.5)
    assert (contest.winner, contest.runner_up) == (PACKED, TURNED)
    assert contest.gain_s == pytest.approx(1.4)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
def test_half_precision_may_be_computed_in_float32(dtype: torch.dtype) -> None:
    """For any number of rows; as float32 is, it would only be copied."""
    linear, seen = layer_of(dtype=dtype), []
    table = RouteTable(None, "nobody's")
    linears = FastLinears(linear, table)
    for rows in (1, 300, 900):
        with torch.no_grad(), linears.installed():
            for _ in range(20):
                linears.prepare(rows)
                linear(torch.randn(rows, INPUTS, dtype=dtype))
    for contest in table.contests.values():
        seen += [name for name, seconds in contest.seconds.items() if seconds]
    assert (WIDENED in seen) == (dtype != torch.float32)
    decided = [int(name.rpartition(", ")[2]) for name, contest in table.contests.items() if contest.winner]
    assert decided == ([1] if dtype == torch.float32 else [1, BUCKETS[-1]])


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_weight_is_converted_piece_by_piece(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(bias, BF16), torch.randn(5, INPUTS).to(BF16)
    sizes, linear = [], functional.linear

    def counted(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        sizes.append(len(weight))
        return linear(x, weight, *bias)

    monkeypatch.setattr(functional, "linear", counted)
    whole = widened(x, layer.weight, layer.bias)
    monkeypatch.setattr(linear_routes, "_WIDENED_BYTES", 4 * INPUTS * 300)
    close(widened(x, layer.weight, layer.bias), whole)
    assert sizes == [OUTPUTS, 300, 300, 100]


def test_a_contest_without_a_route_that_there_is_now_is_held_again(tmp_path: Path) -> None:
    weight, path = torch.empty(9, 5, dtype=BF16), tmp_path / "routes.json"
    old = RouteTable(path, "mine")
    contest = old.contest(weight, True, 4)
    del contest.seconds[WIDENED]
    for route in contest.seconds:
        contest.seconds[route] = [0.5]
    contest.decide()
    old.save()
    assert RouteTable._loaded(path, "mine").contest(weight, True, 4).winner is None


def test_what_was_found_is_kept_by_machine(tmp_path: Path) -> None:
    weight, path = torch.empty(9, 5), tmp_path / "deep" / "routes.json"
    table = RouteTable(path, "mine")
    contest = table.contest(weight, True, 4)
    table.contest(weight, True, 8)  # undecided
    for route in contest.seconds:
        for _ in range(4):
            contest.note(route, 0.5 if route == TURNED else 0.7)
    table.save()
    other = RouteTable(path, "another")
    other.contests = dict(table.contests)
    other.save()
    again = RouteTable._loaded(path, "mine")
    assert set(again.contests) == {"9x5 float32 bias, 4"}
    assert again.contest(weight, True, 4).winner == TURNED
    assert again.contest(weight, True, 8).winner is None
    assert RouteTable._loaded(path, "a third").contests == {}
    assert [file.name for file in path.parent.iterdir()] == ["routes.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"mine": {"a": {"seconds": {"plain": "1"}, "pack_s": null}}}', "\x00"]
)
def test_a_damaged_file_is_as_good_as_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    path.write_text(text)
    table = RouteTable._loaded(path, "mine")
    assert table.contests == {}
    contest = table.contest(torch.empty(9, 5), False, 1)
    for route in contest.seconds:
        for _ in range(4):
            contest.note(route, 1.0)
    table.save()
    assert len(RouteTable._loaded(path, "mine").contests) == 1


def test_what_a_machine_with_long_vectors_stored_is_kept_by_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines of both kinds may share a folder."""
    path = tmp_path / "routes.json"
    stored = {"seconds": {PLAIN: 2.0, "streamed": 1.0, "streamed wide": 0.5}, "pack_s": None}
    path.write_text(json.dumps({"with long vectors": {"9x5 float32, 1": stored}}))
    monkeypatch.delitem(linear_routes.STREAMED, "streamed wide", raising=False)
    monkeypatch.delitem(linear_routes.ROUTES, "streamed wide", raising=False)
    table = RouteTable._loaded(path, "without")
    contest = table.contest(torch.empty(9, 5), False, 1)
    assert "streamed wide" not in contest.seconds
    for route in contest.seconds:
        for _ in range(4):
            contest.note(route, 1.0)
    table.save()
    assert set(json.loads(path.read_text())) == {"with long vectors", "without"}


def test_a_disk_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = RouteTable(tmp_path / "file" / "routes.json", "mine")
    contest = table.contest(torch.empty(9, 5), False, 1)
    contest.decide()
    table.save()


@needs_packing
@pytest.mark.parametrize("num_layers", [1, 5])
def test_what_a_product_takes_to_compile_is_not_timed(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN compiles a product for every new number of rows, and a step with drafts has another number every time."""
    compiled, product, plain = set(), group_products.packed, functional.linear

    def slow_at_first(x: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(x) not in compiled:
            compiled.add(len(x))
            time.sleep(0.05)
        return product(x, *others)

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.01)
        return plain(*arguments)

    monkeypatch.setattr(group_products, "packed", slow_at_first)
    for route in ROUTES:
        monkeypatch.setitem(ROUTES, route, slow)
    layers, table = nn.ModuleList([layer_of(seed=each) for each in range(num_layers)]), RouteTable(None, "nobody's")
    linears = FastLinears(layers, table)
    with torch.no_grad(), linears.installed():
        for rows in 2 * list(range(17, 25)):  # one bucket
            linears.prepare(rows)
            x = torch.randn(rows, INPUTS)
            for layer in layers:
                close(layer(x), plain(x, layer.weight, layer.bias))
    (contest,) = [each for each in table.contests.values() if each.seconds[PLAIN]]
    assert contest.winner == PACKED
    assert contest.cost_s(PACKED) < 0.05


@needs_packing
def test_what_is_done_once_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, and the time that slower routes take while they are compared."""
    plain = functional.linear

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.02)
        return plain(*arguments)

    monkeypatch.setitem(ROUTES, TURNED, slow)
    layer, table = layer_of(), RouteTable(None, "nobody's")
    linears, counts = FastLinears(nn.ModuleList([layer]), table), []
    with torch.no_grad(), linears.installed():
        for _ in range(20):
            linears.prepare(8)
            layer(torch.randn(8, INPUTS))
            counts.append(linears.once_s)
    (contest,) = [each for each in table.contests.values() if each.seconds[PLAIN]]
    slower_s = len(contest.seconds[TURNED]) * 0.02
    assert contest.winner in (PLAIN, PACKED)
    assert counts[-1] == counts[-5], "the contest has ended, and everything is packed"
    assert 0 < linears.packing_s < counts[-1]
    assert counts[-1] - linears.packing_s > slower_s / 2


def test_more_rows_than_the_last_bucket_has_are_no_work_done_once() -> None:
    """Timings are those of the bucket's rows."""
    contest = Contest({PLAIN: [1.0], PACKED: [0.5]})
    assert contest.least_s(BUCKETS[-1] * 4, may_pack=False) == 4.0
    assert contest.least_s(8, may_pack=True) == 0.5


@needs_packing
@pytest.mark.parametrize(
    ("route", "packs", "num_forwards", "expected_s"),
    [
        (PACKED, True, 10, 3.0),  # it packs as well
        (PACKED, True, 2, 2.0),  # two forwards without copies cost less than these
        (PACKED, False, 10, -7.0),  # it saves ten seconds for the price of three
        (PACKED, False, 2, 0.0),
        (TURNED, False, 10, 0.0),
    ],
)
def test_what_packing_adds_to_other_forwards(
    route: str, packs: bool, num_forwards: int, expected_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy saves 1 s in each forward."""
    linears = FastLinears(nn.ModuleList([layer_of()]), table_where(route, pack_s=3.0))
    with torch.no_grad(), linears.installed():
        if packs:
            for _ in range(4):
                linears.prepare(8)
            (shape,) = linears._shapes
            assert shape.copies
            shape.price_s = 3.0
        else:
            linears.prepare(8)
        assert linears.beside_s({8: num_forwards}) == expected_s
        assert linears.beside_s({}) == linears.beside_s({10**6: 5}) == 0.0, "there is no contest for so many rows"
    assert linears.beside_s({8: num_forwards}) == 0.0, "outside of a session nothing is packed"


def test_the_price_follows_the_newest_packings_and_forgives_one() -> None:
    """The first packing is often too cheap, and one may be interrupted."""
    contest = Contest.between(8, torch.float32)
    contest.price(0.001)
    for _ in range(8):
        contest.price(0.01)
    assert contest.pack_s == pytest.approx(0.01, rel=0.02)
    contest.price(1.0)
    assert contest.pack_s == pytest.approx(0.1, rel=0.02)


@needs_packing
def test_copies_are_not_timed_by_the_forward_that_they_are_made_for() -> None:
    """They are in the processor's cache then, and later forwards read them from memory."""
    layers, table = nn.ModuleList([layer_of(seed=each) for each in range(5)]), RouteTable(None, "nobody's")
    linears = FastLinears(layers, table)
    with torch.no_grad(), linears.installed():
        counts = []
        for _ in range(2):
            linears.prepare(8)
            for layer in layers:
                layer(torch.randn(8, INPUTS))
            counts.append(sum(len(each.seconds[PACKED]) for each in table.contests.values()))
    assert counts[0] == 0
    assert counts[1] > 0


@needs_packing
def test_sessions_of_one_forward_end_a_contest_without_packed_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a draft LM for a single token. Otherwise every one of them would pack layers that it never times."""
    packed, pack = [], cpu_linear.packed_weight
    monkeypatch.setattr(cpu_linear, "packed_weight", lambda weight: packed.append(1) or pack(weight))
    layers = nn.ModuleList([layer_of(seed=each) for each in range(5)])
    linears = FastLinears(layers, RouteTable(None, "nobody's"))
    counts = []
    with torch.no_grad():
        for _ in range(15):
            with linears.installed():
                linears.prepare(8)
                for layer in layers:
                    layer(torch.randn(8, INPUTS))
            counts.append(len(packed))
    assert counts[-1] == counts[-5] == 27  # nine times three


@needs_packing
def test_forwards_that_do_not_recur_pack_nothing() -> None:
    linear = layer_of()
    linears = FastLinears(linear, table_where(PACKED))
    with torch.no_grad(), linears.installed():
        for _ in range(9):
            linears.prepare(8, recurs=False)
        assert linears.most_packed_bytes == 0
        linears.prepare(8)
        assert linears.most_packed_bytes == 4 * INPUTS * OUTPUTS


@needs_packing
def test_the_cost_of_packing_is_known_for_every_number_of_rows() -> None:
    layers, table = nn.ModuleList([layer_of(), layer_of(seed=1)]), RouteTable(None, "nobody's")
    linears = FastLinears(layers, table)
    with torch.no_grad(), linears.installed():
        linears.prepare(8)
    assert {bool(contest.pack_s) for contest in table.contests.values()} == {True}


@needs_packing
def test_a_call_does_not_pack_all_layers_if_that_cost_is_not_known() -> None:
    layers = nn.ModuleList([layer_of(seed=each) for each in range(9)])
    table = table_where(PACKED, pack_s=None)
    linears = FastLinears(layers, table)
    with torch.no_grad(), linears.installed():
        linears.prepare(8)
        assert linears.most_packed_bytes == 3 * 4 * INPUTS * OUTPUTS  # those that show what it takes
        linears.prepare(8)  # what a forward without copies loses here, 1 s per layer, is more than that
        assert linears.most_packed_bytes == 9 * 4 * INPUTS * OUTPUTS


def test_nothing_is_packed_under_autocast() -> None:
    """Layers keep PyTorch's route there, so copies would not be used, and a contest would never end."""
    for route in (PACKED, None):
        layer = layer_of()
        linears = FastLinears(layer, table_where(route))
        with torch.no_grad(), torch.autocast("cpu", BF16), linears.installed():
            for _ in range(12):
                linears.prepare(8)
                layer(torch.randn(8, INPUTS))
        assert linears.most_packed_bytes == 0
