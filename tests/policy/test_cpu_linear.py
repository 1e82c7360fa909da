"""Linear layers on a CPU: whatever replaces a forward returns what the module would, is never stale, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_rl.policy import cpu_linear, linear_routes
from atlas_rl.policy.cpu_linear import FastLinears, by_columns
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.linear_routes import (
    BUCKETS,
    DOUBLED,
    MIN_BYTES,
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
from tests.routes import table_where

INPUTS, OUTPUTS = 200, 700  # large enough in bfloat16 as well
BF16, FP16 = torch.bfloat16, torch.float16


@contextmanager
def autocast(*settings: tuple[torch.dtype, bool]) -> Iterator[None]:
    """Nested autocast contexts of the CPU: type, and whether it is enabled."""
    with ExitStack() as stack:
        for dtype, enabled in settings:
            stack.enter_context(torch.autocast("cpu", dtype, enabled=enabled))
        yield


AUTOCASTS = {
    "no autocast": (),
    "bfloat16": ((BF16, True),),
    "float16": ((FP16, True),),
    "disabled": ((BF16, False),),
    "disabled inside of enabled": ((BF16, True), (BF16, False)),
    "enabled inside of disabled": ((BF16, False), (FP16, True)),
}
SHAPES: dict[str, Callable[[int], torch.Tensor]] = {
    "contiguous": lambda rows: torch.randn(rows, INPUTS),
    "a batch of one": lambda rows: torch.randn(1, rows, INPUTS),
    "transposed": lambda rows: torch.randn(INPUTS, rows).t(),
    "strided": lambda rows: torch.randn(rows, 2 * INPUTS)[:, ::2],
    "expanded": lambda rows: torch.randn(INPUTS).expand(rows, INPUTS),
}
ROWS = (1, 17, 257)


def layer_of(bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert ours.is_contiguous() == expected.is_contiguous()
    tolerance = {torch.float32: 1e-5, BF16: 2e-2, FP16: 2e-3}[ours.dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("setting", AUTOCASTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
def test_a_layer_returns_what_it_returns_otherwise(setting: str, bias: bool, dtype: torch.dtype) -> None:
    """By every route, for every number of rows; under autocast, which converts the bias as well, to the bit."""
    linear = layer_of(bias, dtype)
    routes = {route: FastLinears(linear, table_where(route)) for route in (*ROUTES, PACKED, None)}
    num_packed = dict.fromkeys(routes, 0)
    for mode, shapes in ((torch.no_grad, list(SHAPES)), (torch.inference_mode, ["contiguous"])):
        for shape, rows in ((shape, rows) for shape in shapes for rows in ROWS):
            x = SHAPES[shape](rows).to(dtype)
            with mode(), autocast(*AUTOCASTS[setting]):
                expected = linear(x)
                for route, linears in routes.items():
                    with linears.installed():
                        assert linear.forward.__func__ is not nn.Linear.forward
                        for _ in range(1 if route else 3):
                            linears.prepare(rows)
                            ours = linear(input=x)
                            close(ours, expected)
                    num_packed[route] += linears.most_packed_bytes
                    if torch.is_autocast_enabled("cpu"):
                        assert torch.equal(ours, expected)
    assert type(linear) is nn.Linear
    for route, num_bytes in num_packed.items():
        assert (num_bytes > 0) == (route in (PACKED, None) and packed_type(dtype) is not None)


@pytest.mark.parametrize("route", [PLAIN, TURNED, DOUBLED, PACKED])
def test_every_number_of_rows(route: str) -> None:
    linear = layer_of()
    with torch.no_grad():
        for rows in range(BUCKETS[-1] + 2):
            x = torch.randn(rows, INPUTS)
            expected, linears = linear(x), FastLinears(linear, table_where(route))
            with linears.installed():
                linears.prepare(rows)
                close(linear(x), expected)


class Products(TorchDispatchMode):
    """Records the strides of every right operand of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.strides.append(args[1].stride())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("route", "rows"), [(TURNED, 2), (TURNED, 7), (DOUBLED, 1)])
def test_the_rows_are_the_columns_of_the_right_operand(route: str, rows: int) -> None:
    """torch copies an expanded row into the other layout, which one BLAS multiplies three to five times as slowly."""
    with Products() as products, torch.no_grad():
        ROUTES[route](torch.randn(rows, INPUTS), torch.randn(OUTPUTS, INPUTS), None)
    assert products.strides == [(1, INPUTS)]


def test_inputs_of_a_lower_type_into_float32_weights_are_converted_by_autocast_or_refused() -> None:
    linear, x = layer_of(), torch.randn(8, INPUTS, dtype=BF16)
    with torch.no_grad(), FastLinears(linear, table_where(PACKED)).installed():
        with autocast((BF16, True)):
            assert linear(x).dtype == BF16
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x)
        assert linear(torch.randn(INPUTS)).shape == (OUTPUTS,)


# ------------------------------------------------------------------------------------------------------- packed copies


@pytest.fixture
def num_packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the weights that are packed."""
    if packed_type(torch.float32) is None:
        pytest.skip("this torch has no packed linear layers")
    count, pack = [0], cpu_linear.packed_weight

    def counted(weight: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        return pack(weight)

    monkeypatch.setattr(cpu_linear, "packed_weight", counted)
    return count


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "an optimizer's step": lambda layer: layer.weight.add_(1.0),
    "a checkpoint": lambda layer: layer.load_state_dict(layer_of(seed=7).state_dict()),
    "another tensor": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1.0),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_of_the_weight_as_it_is(change: str, num_packed: list[int]) -> None:
    """Within a call, where nobody should change it; and a copy never outlives a call, whoever changes what then."""
    linear, x = layer_of(), torch.randn(4, INPUTS)
    linears = FastLinears(linear, table_where(PACKED))
    with torch.no_grad(), linears.installed():
        linears.prepare(4)
        assert num_packed == [1]
        close(linear(x), functional.linear(x, linear.weight, linear.bias))
        CHANGES[change](linear)
        close(linear(x), functional.linear(x, linear.weight, linear.bias))
    with torch.no_grad(), linears.installed():
        linears.prepare(4)
        assert num_packed == [2]
        close(linear(x), functional.linear(x, linear.weight, linear.bias))


def test_layers_are_packed_when_a_part_of_the_price_was_lost(num_packed: list[int]) -> None:
    """Without a copy a forward loses 1 s per layer; a copy costs 10: after three forwards all layers have one."""
    model = nn.Sequential(layer_of(), nn.Linear(OUTPUTS, INPUTS), layer_of(seed=1))
    linears = FastLinears(model, table_where(PACKED, pack_s=10.0))
    with torch.no_grad(), linears.installed():
        counts = []
        for _ in range(5):
            linears.prepare(8)
            model(torch.randn(8, INPUTS))
            counts.append(num_packed[0])
        assert counts == [0, 0, 3, 3, 3]
        assert linears.most_packed_bytes == 3 * 4 * INPUTS * OUTPUTS
    assert linears.packing_s > 0


@pytest.mark.parametrize("route", [PACKED, None])
def test_no_memory_no_copies(route: str | None, num_packed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "free_bytes", lambda device: 0)
    linear, x = layer_of(), torch.randn(4, INPUTS)
    linears = FastLinears(linear, table_where(route))
    with torch.no_grad(), linears.installed():
        for _ in range(20):
            linears.prepare(4)
            close(linear(x), functional.linear(x, linear.weight, linear.bias))
    assert num_packed == [0]
    assert linears.packing_s == linears.most_packed_bytes == 0


# ------------------------------------------------------------------------------------------------------------ contests


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


def test_a_disk_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = RouteTable(tmp_path / "file" / "routes.json", "mine")
    contest = table.contest(torch.empty(9, 5), False, 1)
    contest.decide()
    table.save()


# ------------------------------------------------------------------------------------------------------ who takes part


def test_only_plain_layers_that_outgrow_a_cores_cache_are_touched() -> None:
    class Custom(nn.Linear):
        pass

    small = nn.Linear(16, MIN_BYTES // 4 // 16 - 1)
    layers = nn.ModuleList(
        [
            layer_of(),
            layer_of(dtype=BF16),
            layer_of(dtype=torch.float64),
            Custom(INPUTS, OUTPUTS),
            layer_of(),
            small,
        ]
    )
    layers[4].forward = own = lambda x: x
    with FastLinears(layers, table_where(None)).installed():
        assert [type(layer) is not class_of(layer) for layer in layers] == [True, True, False, False, False, False]
        assert layers[4].forward is own
    assert all(type(layer) is class_of(layer) for layer in layers)
    assert ["forward" in layer.__dict__ for layer in layers] == [False, False, False, False, True, False]


def test_layers_are_put_back_after_an_exception_and_sessions_nest() -> None:
    linear = layer_of()
    linears = FastLinears(linear, table_where(PACKED))

    def fail() -> None:
        with linears.installed():
            with linears.installed():
                assert linear.forward.__func__ is not nn.Linear.forward
            assert linear.forward.__func__ is not nn.Linear.forward
            linears.prepare(4)
            assert linears.most_packed_bytes == (4 * INPUTS * OUTPUTS if packed_type(torch.float32) else 0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert type(linear) is nn.Linear


def test_by_columns_is_the_same_weight() -> None:
    weight = torch.randn(5, 3)
    assert torch.equal(by_columns(weight), weight)
    assert by_columns(weight).stride() == (1, 5)
