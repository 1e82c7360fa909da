"""Float32 linear layers on a CPU: the faster route gives the plain product, where it is taken, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atlas_rl.policy.cpu_linear import MAX_ROWS, MIN_ROWS, streamed_weights


@pytest.mark.parametrize("bias", [False, True])
def test_streamed_weights_equal_the_plain_product(bias):
    torch.manual_seed(0)
    linear = nn.Linear(33, 50, bias=bias)
    for rows in range(1, 71):
        x = torch.randn(rows, 33)
        with streamed_weights(linear):
            assert "forward" in linear.__dict__
            torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    x = torch.randn(2, 7, 33)
    with streamed_weights(linear):
        out = linear(x)
    torch.testing.assert_close(out, nn.functional.linear(x, linear.weight, linear.bias))
    assert out.shape == (2, 7, 50)
    assert "forward" not in linear.__dict__


def test_the_route_is_taken_where_it_is_faster_only(monkeypatch):
    linear, calls, plain = nn.Linear(8, 8, bias=False), [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(args) or plain(*args))
    for rows, streamed in ((MIN_ROWS - 1, False), (MIN_ROWS, True), (MAX_ROWS, True), (MAX_ROWS + 1, False)):
        calls.clear()
        with streamed_weights(linear):
            linear(torch.randn(rows, 8))
        assert (not calls) == streamed


def test_only_plain_float32_layers_are_touched():
    class Custom(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), Custom(4, 4), nn.Linear(4, 4)])
    layers[3].forward = own = lambda x: x
    with streamed_weights(layers):
        assert ["forward" in layer.__dict__ for layer in layers] == [True, False, False, True]
        assert layers[3].forward is own
    assert ["forward" in layer.__dict__ for layer in layers] == [False, False, False, True]


def test_streamed_weights_are_put_back_after_an_exception():
    linear = nn.Linear(4, 4)
    with pytest.raises(KeyError), streamed_weights(linear):
        raise KeyError
    assert "forward" not in linear.__dict__
