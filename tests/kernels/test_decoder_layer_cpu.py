"""A decoder layer as one compiled function returns, to the bit, what its operations return one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from atlas_kernels import attend_cpu, few_rows_cpu, gate_cpu
from atlas_kernels.attend_cpu import Cache, attend_rows
from atlas_kernels.decoder_layer_cpu import Norm, Shape, decoder_layer, fits, plan_of, step_of, weights_of
from atlas_kernels.few_rows_cpu import FORMS, few_rows_linear
from atlas_kernels.gate_cpu import silu_times
from atlas_kernels.layer_cpu import add_and_norm, rms_norm_cpu, rotate_in_place

SHAPE = Shape(hidden=40, heads=6, kv_heads=2, dim=8, inner=52)
STARTS, LENGTHS = np.array([9, 0, 30]), np.array([1, 4, 2])


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request, monkeypatch):
    """Threads that every operation is divided among, however small it is."""
    for module in (attend_cpu, few_rows_cpu, gate_cpu):
        monkeypatch.setattr(module, "_GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


class Projection(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None


class Layer(NamedTuple):
    """A layer's weights and cache, and how it is run."""

    projections: list[Projection]
    norms: list[Norm]
    cache: Cache
    scale: float
    window: int | None
    form: int


def run(x, angles, layer):
    """The layer as one kernel, with working memory of any content."""
    work = torch.full((len(x) * SHAPE.work_columns,), float("nan"))
    weights, biases = zip(*layer.projections, strict=True)
    assert fits(SHAPE, weights, biases, [norm.weight for norm in layer.norms])
    weights = weights_of(weights, biases, layer.norms, layer.scale, layer.window)
    plan, step = plan_of(SHAPE, len(x), [layer.form] * 4, work), step_of(SHAPE, angles, layer.cache)
    return decoder_layer(x, layer.cache.keys, layer.cache.values, weights, plan, step)


def made(form=0, biases=True, head_norms=True, adds_one=False, window=None):
    """A layer of random weights and its cache."""
    torch.manual_seed(0)
    rows = np.array([3, 0, 1])
    positions = np.concatenate([start + np.arange(length) for start, length in zip(STARTS, LENGTHS, strict=True)])
    cache = Cache(
        keys=torch.randn(4, 40, SHAPE.kv_heads, SHAPE.dim),
        values=torch.randn(4, 40, SHAPE.kv_heads, SHAPE.dim),
        rows=torch.from_numpy(np.repeat(rows, LENGTHS)),
        positions=torch.from_numpy(positions),
        offsets=torch.from_numpy(np.append(0, np.cumsum(LENGTHS)).astype(np.int32)),
        context=int((STARTS + LENGTHS).max()),
    )
    return Layer(
        projections=[
            Projection(torch.randn(size) / 6, torch.randn(size[0]) if biases else None) for size in SHAPE.weights
        ],
        norms=[
            Norm(torch.rand(size), 10.0**-at, adds_one)
            for at, size in enumerate(SHAPE.norms[: 4 if head_norms else 2], 3)
        ],
        cache=cache,
        scale=0.3,
        window=window,
        form=form,
    )


def one_by_one(x, angles, layer):
    """The same by the kernels of each operation."""

    def product(rows, *indices):
        each = [layer.projections[index] for index in indices]
        outs = few_rows_linear(rows, [projection.weight for projection in each], layer.form)
        return [out if of.bias is None else out + of.bias for out, of in zip(outs, each, strict=True)]

    def normed(rows, norm):
        return rms_norm_cpu(rows, norm.weight, norm.eps, norm.adds_one, True)

    query, key, value = product(normed(x, layer.norms[0]), 0, 1, 2)
    query, key, value = (each.view(len(x), -1, SHAPE.dim) for each in (query, key, value))
    if len(layer.norms) > 2:
        query, key = normed(query, layer.norms[2]), normed(key, layer.norms[3])
    rotate_in_place(query.flatten(1), key.flatten(1), *angles, SHAPE.dim)
    attended = attend_rows(query, key, value, *layer.cache, layer.scale, layer.window)
    (out,) = product(attended.flatten(1), 3)
    second = layer.norms[1]
    gate, up = product(add_and_norm(x, out, second.weight, second.eps, second.adds_one), 4, 5)
    return out + product(silu_times(gate, up), 6)[0]


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize(
    "options",
    [{}, {"biases": False}, {"head_norms": False}, {"adds_one": True}, {"window": 5}],
    ids=["all", "no biases", "no head norms", "one is added", "window"],
)
@pytest.mark.usefixtures("threads")
def test_it_is_its_operations_one_by_one(form, options):
    torch.manual_seed(1)
    x, angles = torch.randn(LENGTHS.sum(), SHAPE.hidden), tuple(torch.randn(2, LENGTHS.sum(), SHAPE.dim))
    layer, same = made(form, **options), made(form, **options)
    given = x.clone()
    ours, expected = run(x, angles, layer), one_by_one(x, angles, same)
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, expected)
    assert torch.equal(layer.cache.keys, same.cache.keys)
    assert torch.equal(layer.cache.values, same.cache.values)
    assert torch.equal(x, given)


def test_every_weight_counts():
    """Each one of them changes the result, so that none is left out or used twice."""
    torch.manual_seed(1)
    x, angles = torch.randn(LENGTHS.sum(), SHAPE.hidden), tuple(torch.randn(2, LENGTHS.sum(), SHAPE.dim))
    seen = [run(x, angles, made())]
    for tensors in ("weight", "bias"):
        for index in range(7):
            layer = made()
            getattr(layer.projections[index], tensors)[0] += 0.5
            seen.append(run(x, angles, layer))
    for index in range(4):
        layer = made()
        layer.norms[index].weight.mul_(1.5)
        seen.append(run(x, angles, layer))
    assert len({out.numpy().tobytes() for out in seen}) == len(seen) == 19


def test_other_weights_do_not_fit():
    layer = made()
    norms = [norm.weight for norm in layer.norms]

    def fit(third=layer.projections[2], norms=norms):
        projections = [*layer.projections[:2], third, *layer.projections[3:]]
        return fits(SHAPE, *zip(*projections, strict=True), norms)

    weight, bias = layer.projections[2]
    assert fit()
    assert fit(norms=norms[:2])
    assert fit(Projection(torch.nn.Parameter(weight), None))
    for other in (
        Projection(weight.double(), bias),
        Projection(weight[:-1], bias),
        Projection(weight.t().contiguous().t(), bias),
        Projection(None, bias),
        Projection(weight, bias.bfloat16()),
        Projection(weight, bias[:-1]),
        Projection(weight, bias[:1].expand(len(bias))),
        Projection(weight.to("meta"), bias),
        Projection(weight.as_subclass(Another), bias),
    ):
        assert not fit(other)
    assert not fit(norms=[norms[0], torch.ones(41)])


class Another(torch.Tensor):
    """A tensor of another class, which may have no address."""


def test_a_weight_without_memory_is_not_read():
    layer = made()
    layer.projections[4].weight.untyped_storage().resize_(0)
    x, angles = torch.zeros(LENGTHS.sum(), SHAPE.hidden), tuple(torch.zeros(2, LENGTHS.sum(), SHAPE.dim))
    with pytest.raises(RuntimeError, match="has no memory"):
        run(x, angles, layer)
