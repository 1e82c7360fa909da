"""Attention of few tokens per row, compiled: numpy's numbers, for any shape, on one thread and on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_kernels import attend_cpu, attend_sums
from atlas_kernels.attend_cpu import attend_rows

SCALE = 0.3


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(heads, kv_heads, dim, value_dim, starts, lengths=None):
    """Tokens from some positions on, one per row or `lengths`, in rows of another order; a cache with room to spare."""
    batch, lengths = len(starts), torch.tensor(lengths or [1] * len(starts))
    tokens, ends = int(lengths.sum()), torch.tensor(starts) + lengths
    new = (
        numbers(tokens, heads, dim),
        numbers(tokens, kv_heads, dim, seed=1),
        numbers(tokens, kv_heads, value_dim, seed=2),
    )
    keys = numbers(batch + 1, int(ends.max()) + 2, kv_heads, dim, seed=3)
    values = numbers(batch + 2, int(ends.max()) + 4, kv_heads, value_dim, seed=4)
    rows = torch.arange(batch, 0, -1).repeat_interleave(lengths)
    positions = torch.cat([torch.arange(start, end) for start, end in zip(starts, ends.tolist(), strict=True)])
    return *new, keys, values, rows, positions, torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()


def attend(arguments, window=None):
    return attend_rows(*arguments, int(arguments[6].max()) + 1, SCALE, window)


def by_numpy(query, key, value, keys, values, rows, positions, _, window):
    """Attention by its formula in float64, over copies of the cache; returns the copies as well."""
    keys, values = keys.double().numpy().copy(), values.double().numpy().copy()
    out = np.zeros((*query.shape[:2], value.shape[2]))
    keys[rows, positions], values[rows, positions] = key, value
    for token, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
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
    for starts, lengths in (
        ([0], None),
        ([0, 1, 2, 3, 4, 130], None),
        ([7] * 5, None),
        ([0, 40, 131, 7], [3, 1, 16, 2]),
        ([60], [40]),  # more tokens than are computed at once
    ):
        arguments = case(heads, kv_heads, dim, value_dim, starts, lengths)
        expected, keys, values = by_numpy(*arguments, window)
        out = attend(arguments, window)
        assert np.abs(out.numpy() - expected).max() < 2e-6
        assert np.array_equal(arguments[3].numpy(), keys.astype(np.float32))
        assert np.array_equal(arguments[4].numpy(), values.astype(np.float32))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 6, 50])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (4, 1)])
def test_a_token_does_not_depend_on_the_others(heads, kv_heads, window):
    arguments = case(heads, kv_heads, 64, 64, [5, 90, 33, 70], [4, 1, 2, 20])
    *tensors, rows, positions, _ = arguments
    whole = attend(arguments, window)
    for token in range(len(rows)):  # of a row in order: the cache of the first ones is filled by then
        own = slice(token, token + 1)
        alone = (
            *(each[own] for each in tensors[:3]),
            *tensors[3:],
            rows[own],
            positions[own],
            torch.tensor([0, 1]).int(),
        )
        assert torch.equal(attend(alone, window)[0], whole[token])


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_threads_share_all_tasks(parts):
    *_, positions, offsets = case(6, 3, 4, 4, [0, 400, 3, 90], [1, 2, 9, 4])
    call = np.zeros(21, np.int64)
    call[[6, 7, 9, 11, 20]] = positions.data_ptr(), offsets.data_ptr(), len(positions), 3, 4
    firsts = [attend_cpu._first_task(call, part, parts) for part in range(parts + 1)]
    assert (firsts[0], firsts[-1]) == (0, 12)
    assert firsts == sorted(firsts)
    if parts == 2:
        assert firsts[1] == 5, "the three tasks of the first row and two of the second, which takes two thirds of all"


def test_scores_far_apart_and_numbers_that_are_none():
    query, *others = case(2, 1, 8, 8, [40], [2])
    keys, values = others[2:4]
    out = attend((1e4 * query, *others))
    for token in range(2):
        best = (keys[1, : 41 + token, 0] @ query[token].T).argmax(0)  # softmax of such scores is their largest
        assert torch.equal(out[token], values[1, best, 0])
    others[0][1, 0, 0] = float("nan")  # the second token's key
    out = attend((query, *others))
    assert out[0].isfinite().all(), "a draft changes nothing before it"
    assert out[1].isnan().all()


def test_the_exponential_is_that_of_numpy():
    x = -np.concatenate([np.linspace(0, 87, 20001), [1e30, np.inf]]).astype(np.float32)
    found = np.array([attend_sums.exp(each) for each in x])
    assert np.allclose(found, np.exp(x.astype(np.float64)), rtol=3e-7, atol=2e-38)


@pytest.mark.parametrize("broken", ["heads", "dim", "type", "strides", "places", "offsets"])
def test_what_does_not_fit_is_refused(broken):
    query, key, value, keys, values, rows, positions, offsets = case(4, 2, 8, 8, [3, 5])
    if broken == "heads":
        query = query[:, :3].contiguous()
    elif broken == "dim":
        keys = keys[..., :6].contiguous()
    elif broken == "type":
        value = value.half()
    elif broken == "strides":
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    elif broken == "offsets":
        offsets = offsets[:2]
    else:
        rows = rows[:1]
    with pytest.raises(ValueError, match="must be contiguous"):
        attend_rows(query, key, value, keys, values, rows, positions, offsets, 6, SCALE, None)
