"""Attention of one token per row, compiled: numpy's numbers, for any shape, on one thread and on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_kernels import attend_cpu
from atlas_kernels.attend_cpu import attend_single

SCALE = 0.3


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(heads, kv_heads, dim, value_dim, positions):
    """Tokens at some positions of rows in another order, and a cache with a row and some cells to spare."""
    tokens = len(positions)
    new = (
        numbers(tokens, heads, dim),
        numbers(tokens, kv_heads, dim, seed=1),
        numbers(tokens, kv_heads, value_dim, seed=2),
    )
    keys = numbers(tokens + 1, max(positions) + 3, kv_heads, dim, seed=3)
    values = numbers(tokens + 2, max(positions) + 5, kv_heads, value_dim, seed=4)
    return *new, keys, values, torch.arange(tokens, 0, -1), torch.tensor(positions)


def by_numpy(query, key, value, keys, values, rows, positions, window):
    """Attention by its formula in float64, over copies of the cache; returns the copies as well."""
    keys, values = keys.double().numpy().copy(), values.double().numpy().copy()
    out = np.zeros((*query.shape[:2], value.shape[2]))
    for token, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        keys[row, position], values[row, position] = key[token], value[token]
        first = 0 if window is None else max(0, position + 1 - window)
        for head in range(query.shape[1]):
            of = head // (query.shape[1] // key.shape[1])
            scores = SCALE * keys[row, first : position + 1, of] @ query[token, head].double().numpy()
            shares = np.exp(scores - scores.max())
            out[token, head] = shares @ values[row, first : position + 1, of] / shares.sum()
    return out, keys, values


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """Threads that a call is divided among, however small it is."""
    monkeypatch.setattr(attend_cpu, "_GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"), [(9, 3, 64, 64), (4, 4, 20, 7), (8, 1, 33, 16), (2, 2, 1, 1)]
)
def test_it_is_attention_by_its_formula(heads, kv_heads, dim, value_dim, window):
    for positions in ([0], [0, 1, 2, 3, 4, 130], [7] * 5):
        arguments = case(heads, kv_heads, dim, value_dim, positions)
        expected, keys, values = by_numpy(*arguments, window)
        out = attend_single(*arguments, max(positions) + 1, SCALE, window)
        assert np.abs(out.numpy() - expected).max() < 2e-6
        assert np.array_equal(arguments[3].numpy(), keys.astype(np.float32))
        assert np.array_equal(arguments[4].numpy(), values.astype(np.float32))


def test_a_token_does_not_depend_on_the_others():
    query, key, value, keys, values, rows, positions = case(9, 3, 64, 64, [5, 90, 33])
    whole = attend_single(query, key, value, keys, values, rows, positions, 91, SCALE, None)
    for token in range(3):
        own = slice(token, token + 1)
        alone = attend_single(
            query[own], key[own], value[own], keys, values, rows[own], positions[own], 91, SCALE, None
        )
        assert torch.equal(alone[0], whole[token])


def test_scores_far_apart_and_numbers_that_are_none():
    query, key, value, keys, values, rows, positions = case(2, 1, 8, 8, [40])
    out = attend_single(1e4 * query, key, value, keys, values, rows, positions, 41, SCALE, None)
    best = (keys[1, :41, 0] @ query[0].T).argmax(0)  # softmax of such scores is their largest
    assert torch.equal(out[0], values[1, best, 0])
    keys[1, 3, 0, 0] = float("nan")
    assert attend_single(query, key, value, keys, values, rows, positions, 41, SCALE, None).isnan().all()


def test_the_exponential_is_that_of_numpy():
    x = -np.concatenate([np.linspace(0, 87, 20001), [1e30, np.inf]]).astype(np.float32)
    found = np.array([attend_cpu._exp(each) for each in x])
    assert np.allclose(found, np.exp(x.astype(np.float64)), rtol=3e-7, atol=2e-38)


@pytest.mark.parametrize("broken", ["heads", "dim", "type", "strides", "places"])
def test_what_does_not_fit_is_refused(broken):
    query, key, value, keys, values, rows, positions = case(4, 2, 8, 8, [3, 5])
    if broken == "heads":
        query = query[:, :3].contiguous()
    elif broken == "dim":
        keys = keys[..., :6].contiguous()
    elif broken == "type":
        value = value.half()
    elif broken == "strides":
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        rows = rows[:1]
    with pytest.raises(ValueError, match="must be contiguous"):
        attend_single(query, key, value, keys, values, rows, positions, 6, SCALE, None)
