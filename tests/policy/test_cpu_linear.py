"""Linear layers on a CPU: whatever replaces a forward returns what the module would, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

from atlas_rl.policy.cpu_linear import MAX_ROWS, MIN_ROWS, by_columns, linear_rows, streamed_weights
from atlas_rl.policy.guise import class_of

INPUTS, OUTPUTS = 33, 50


@contextmanager
def autocast(*settings: tuple[torch.dtype, bool]) -> Iterator[None]:
    """Nested autocast contexts of the CPU: type, and whether it is enabled."""
    with ExitStack() as stack:
        for dtype, enabled in settings:
            stack.enter_context(torch.autocast("cpu", dtype, enabled=enabled))
        yield


BF16, FP16 = torch.bfloat16, torch.float16
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
ROUTES = (1, MIN_ROWS - 1, MIN_ROWS, 17, MAX_ROWS, MAX_ROWS + 1, 70)


def assert_same(ours: torch.Tensor, expected: torch.Tensor, *, exactly: bool) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert ours.is_contiguous() == expected.is_contiguous()
    torch.testing.assert_close(ours, expected, **({"rtol": 0, "atol": 0} if exactly else {}))


@pytest.mark.parametrize("setting", AUTOCASTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("columns", [False, True])
def test_a_layer_returns_what_it_returns_otherwise(setting: str, bias: bool, dtype: torch.dtype, columns: bool) -> None:
    """Under autocast the bias is bfloat16 as well: a float32 one made keys of another type than their cache."""
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)
    if columns:
        linear.weight.data = by_columns(linear.weight.data)
    for mode in (torch.no_grad, torch.inference_mode):
        for shape, rows in ((shape, rows) for shape in SHAPES.values() for rows in ROUTES):
            x = shape(rows).to(dtype)
            with mode(), autocast(*AUTOCASTS[setting]):
                expected = linear(x)
                with streamed_weights(linear):
                    assert (linear.forward.__func__ is not nn.Linear.forward) == (dtype == torch.float32)
                    ours = linear(input=x)
            in_float32 = expected.dtype == torch.float32
            assert_same(ours, expected, exactly=not in_float32 or not MIN_ROWS <= rows <= MAX_ROWS)
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("setting", AUTOCASTS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_number_of_rows(setting: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    for rows in range(71):
        x = torch.randn(rows, INPUTS)
        with torch.no_grad(), autocast(*AUTOCASTS[setting]):
            ours, expected = linear_rows(x, linear.weight, linear.bias), linear(x)
        assert_same(ours, expected, exactly=expected.dtype != torch.float32)


def test_inputs_of_a_lower_type_into_float32_weights_are_converted_by_autocast_or_refused() -> None:
    linear, x = nn.Linear(INPUTS, OUTPUTS), torch.randn(8, INPUTS, dtype=BF16)
    with torch.no_grad(), streamed_weights(linear):
        with autocast((BF16, True)):
            assert linear(x).dtype == BF16
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x)
        assert linear(torch.randn(INPUTS)).shape == (OUTPUTS,)


def test_the_route_is_taken_where_it_is_faster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, calls, plain = nn.Linear(8, 8, bias=False), [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(args) or plain(*args))
    for rows, streamed in ((MIN_ROWS - 1, False), (MIN_ROWS, True), (MAX_ROWS, True), (MAX_ROWS + 1, False)):
        calls.clear()
        with streamed_weights(linear):
            linear(torch.randn(rows, 8))
        assert (not calls) == streamed


def test_only_plain_float32_layers_are_touched() -> None:
    class Custom(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), Custom(4, 4), nn.Linear(4, 4)])
    layers[3].forward = own = lambda x: x
    with streamed_weights(layers):
        assert [type(layer) is class_of(layer) for layer in layers] == [False, True, True, True]
        assert layers[3].forward is own
    assert ["forward" in layer.__dict__ for layer in layers] == [False, False, False, True]


def test_streamed_weights_are_put_back_after_an_exception() -> None:
    linear = nn.Linear(4, 4)
    with pytest.raises(KeyError), streamed_weights(linear):
        raise KeyError
    assert type(linear) is nn.Linear
