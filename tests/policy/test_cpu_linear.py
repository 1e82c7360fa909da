"""Linear layers on a CPU: whatever replaces a forward returns what the module would, is never stale, and leaves no trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_rl.policy import cpu_linear
from atlas_rl.policy.cpu_linear import FastLinears, by_columns
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.linear_routes import (
    BUCKETS,
    DOUBLED,
    MIN_BYTES,
    PACKED,
    PLAIN,
    ROUTES,
    STREAMED,
    TURNED,
    packed_type,
)
from tests.policy.linears import BF16, FP16, INPUTS, OUTPUTS, close, layer_of
from tests.routes import table_where


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
        may_pack = route in (PACKED, None) and packed_type(dtype) is not None
        assert (num_bytes > 0) == (may_pack and not any(enabled for _, enabled in AUTOCASTS[setting][-1:]))


@pytest.mark.parametrize("route", [PLAIN, TURNED, DOUBLED, *STREAMED, PACKED])
def test_every_number_of_rows(route: str) -> None:
    linear = layer_of()
    with torch.no_grad():
        for rows in range(BUCKETS[-1] + 2):
            x = torch.randn(rows, INPUTS)
            expected, linears = linear(x), FastLinears(linear, table_where(route))
            with linears.installed():
                linears.prepare(rows)
                close(linear(x), expected)


@pytest.mark.parametrize("route", [*ROUTES, PACKED])
def test_a_forward_with_gradients_is_pytorchs(route: str) -> None:
    linear, x = layer_of(), torch.randn(3, INPUTS)
    with FastLinears(linear, table_where(route)).installed():
        out = linear(x)
    out.sum().backward()
    assert torch.equal(linear.weight.grad, x.sum(0).expand(OUTPUTS, INPUTS))


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


def test_layers_are_packed_when_their_price_was_lost(num_packed: list[int]) -> None:
    """Without a copy a forward loses 1 s per layer; a copy costs 3.5: in the fourth forward all layers get one."""
    model = nn.Sequential(layer_of(), nn.Linear(OUTPUTS, INPUTS), layer_of(seed=1))
    linears = FastLinears(model, table_where(PACKED, pack_s=3.5))
    with torch.no_grad(), linears.installed():
        counts = []
        for _ in range(5):
            linears.prepare(8)
            model(torch.randn(8, INPUTS))
            counts.append(num_packed[0])
        assert counts == [0, 0, 0, 3, 3]
        assert linears.most_packed_bytes == 3 * 4 * INPUTS * OUTPUTS
    assert linears.packing_s > 0


@pytest.mark.parametrize(("num_forwards", "expected"), [(3, 0), (4, 3)])
def test_layers_are_packed_at_once_if_that_would_have_paid_in_the_call_before(
    num_forwards: int, expected: int, num_packed: list[int]
) -> None:
    """Prompts and audits between the calls make no difference, nor does memory that was too short for copies."""
    model = nn.Sequential(layer_of(), nn.Linear(OUTPUTS, INPUTS), layer_of(seed=1))
    linears = FastLinears(model, table_where(PACKED, pack_s=3.5))
    with torch.no_grad():
        with linears.installed(), pytest.MonkeyPatch.context() as short:
            short.setattr(cpu_linear, "free_bytes", lambda device: 0)
            for _ in range(num_forwards):
                linears.prepare(8)
        with linears.installed():
            linears.prepare(8, recurs=False)
        assert num_packed == [0]
        with linears.installed():
            linears.prepare(8)
            assert num_packed == [expected]


def test_calls_of_another_purpose_say_nothing_of_this_one(num_packed: list[int]) -> None:
    """A rerun without speculation comes between two generations."""
    linears = FastLinears(layer_of(), table_where(PACKED, pack_s=3.5))
    counts = []
    with torch.no_grad():
        for purpose, num_forwards in [(True, 5), (False, 1), (True, 1), (False, 1)]:
            linears.purpose = purpose
            with linears.installed():
                for _ in range(num_forwards):
                    linears.prepare(8)
            counts.append(num_packed[0])
    assert counts == [1, 1, 2, 2]


def test_a_call_of_the_expected_length_is_not_packed_near_its_end(num_packed: list[int]) -> None:
    """Forwards of one row gain nothing; what is still to come when there are more does not pay the price."""
    table = table_where(PACKED, pack_s=3.5)
    linears = FastLinears(nn.Sequential(layer_of(), layer_of(seed=1)), table)
    with torch.no_grad():
        with linears.installed():
            for _ in range(5):
                linears.prepare(8)
        assert num_packed == [2]
        with linears.installed():
            for shape in linears._shapes:
                shape.gained_s = 2.0 * 2  # as if two forwards had been made while memory was short
            linears.prepare(8)
            assert num_packed == [2]


def test_copies_go_with_their_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is wanted back at once, not when Python looks for circles."""
    made, pack = [], cpu_linear.packed_weight
    monkeypatch.setattr(
        cpu_linear, "packed_weight", lambda weight: made.append(weakref.ref(copy := pack(weight))) or copy
    )
    model = nn.Sequential(layer_of(), nn.Linear(OUTPUTS, INPUTS))
    linears = FastLinears(model, table_where(PACKED, pack_s=0.0))
    gc.disable()
    try:
        with torch.no_grad(), linears.installed():
            for _ in range(2):
                linears.prepare(8)
                model(torch.randn(8, INPUTS))
            assert len(made) == 2
            assert all(each() is not None for each in made)
        assert all(each() is None for each in made)
    finally:
        gc.enable()


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
