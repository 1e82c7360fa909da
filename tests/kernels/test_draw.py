"""The draw kernels: interpreted (or on the GPU, where there is one) they are their reference, and that is what others draw.

`verify` chooses the same over the whole vocabulary, the engine's samplers on the CPU the same over either.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_kernels.draw import RowDraws, draw
from atlas_kernels.noise import Stream, request_keys
from atlas_kernels.verify import verify
from atlas_rl.sampling.verification import choose
from atlas_rl.speculators.drawing import choose_among

pytest.importorskip("triton", reason="the kernels need Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCAB = 12, 700


def rows_of(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise keys and positions, among them large ones."""
    keys = torch.from_numpy(request_keys(seed, rows).view(np.int64))
    return keys, torch.arange(rows) * 1_000_003 % 2**31


def logits_of(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def ids_of(count: int, vocab: int) -> torch.Tensor:
    """Some of the policy's tokens, sorted."""
    return torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:count].sort().values


def run(logits: torch.Tensor, implementation: str, token_ids: torch.Tensor | None = None, **options) -> RowDraws:
    keys, positions = (tensor.to(DEVICE) for tensor in rows_of(len(logits)))
    ids = None if token_ids is None else token_ids.to(DEVICE)
    return draw(logits.to(DEVICE), keys, positions, token_ids=ids, implementation=implementation, **options)


def assert_same(logits: torch.Tensor, token_ids: torch.Tensor | None = None, **options) -> RowDraws:
    """The kernel's answer, once it is found to be the reference's."""
    before = logits.clone()
    kernel, reference = (run(logits, how, token_ids, **options) for how in ("triton", "reference"))
    assert torch.equal(kernel.indices, reference.indices)
    torch.testing.assert_close(kernel.max_probs, reference.max_probs, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, before)
    return kernel


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("rows", "tokens"), [(0, 9), (1, 1), (1, 257), (9, 257), (2, 1025), (1, 5000)])
def test_awkward_shapes(rows, tokens, reduced):
    assert_same(logits_of(rows, tokens), ids_of(tokens, 3 * tokens) if reduced else None)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(
    ("dtype", "temperature", "stream"),
    [
        (torch.float32, 0.0, Stream.TARGET),
        (torch.float32, 0.6, Stream.DRAFT),
        (torch.bfloat16, 0.6, Stream.TARGET),
        (torch.float16, 1.0, Stream.DRAFT),
    ],
)
def test_types_temperatures_and_streams(dtype, temperature, stream, reduced):
    options = {"temperature": temperature, "stream": stream}
    drawn = assert_same(logits_of(6, VOCAB).to(dtype), ids_of(VOCAB, 4 * VOCAB) if reduced else None, **options)
    assert drawn.indices.unique().numel() > 3  # every row has noise, and logits, of its own


@pytest.mark.parametrize("reduced", [False, True])
def test_excluded_tokens_are_never_drawn(reduced):
    excluded = torch.rand(ROWS, VOCAB, generator=torch.Generator().manual_seed(3)) < 0.9
    excluded[:, 11] = False
    excluded[0], excluded[0, 699] = True, False
    logits = logits_of(ROWS, VOCAB).masked_fill(excluded, float("-inf"))
    drawn = assert_same(logits, ids_of(VOCAB, 4 * VOCAB) if reduced else None)
    assert not excluded.gather(1, drawn.indices.cpu()[:, None]).any()
    assert drawn.indices[0] == 699


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_no_distribution_are_told_and_stay_inside(value, temperature, reduced):
    logits = logits_of(3, VOCAB)
    logits[1, 5] = value
    if value == float("-inf"):
        logits[1] = value
    for how in ("triton", "reference"):
        drawn = run(logits, how, ids_of(VOCAB, 4 * VOCAB) if reduced else None, temperature=temperature)
        assert drawn.max_probs.isnan().tolist() == [False, True, False]
        assert 0 <= int(drawn.indices[1]) < VOCAB


def test_the_first_of_equals_is_taken():
    logits = torch.zeros(2, 2000)
    logits[:, [700, 1500]] = 4.0
    for ids in (None, ids_of(2000, 4000)):
        assert assert_same(logits, ids, temperature=0.0).indices.tolist() == [700, 700]


def test_a_drafter_with_the_policys_logits_draws_the_policys_tokens():
    """Over the whole vocabulary, and over a reduced one that has every token the policy allows."""
    logits, (keys, positions) = logits_of(ROWS, VOCAB), rows_of(ROWS)
    ids = ids_of(90, VOCAB)
    masked = torch.full_like(logits, float("-inf")).index_copy(1, ids, logits[:, ids])
    for theirs, ours, token_ids in ((logits, logits, None), (masked, logits[:, ids].contiguous(), ids)):
        nothing, starts = torch.full((ROWS,), -1), torch.arange(ROWS + 1)
        expected = verify(theirs, nothing, starts, keys, positions, temperature=0.7, implementation="reference")
        drawn = assert_same(ours, token_ids, temperature=0.7)
        found = drawn.indices.cpu() if token_ids is None else token_ids[drawn.indices.cpu()]
        assert torch.equal(found, expected.token_ids)
        torch.testing.assert_close(drawn.max_probs.cpu(), expected.max_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [Stream.TARGET, Stream.DRAFT])
def test_it_is_what_the_samplers_on_a_cpu_draw(stream):
    logits, (keys, positions) = logits_of(ROWS, VOCAB), rows_of(ROWS)
    probs, host = logits.softmax(dim=-1), (keys.numpy().view(np.uint64), positions.numpy())
    ids = ids_of(VOCAB, 4 * VOCAB)
    whole = choose(probs, *host, stream, greedy=False)
    among = choose_among(probs.numpy(), ids.numpy(), *host, int(stream))
    assert run(logits, "triton", stream=stream).indices.tolist() == whole.tolist()
    assert run(logits, "triton", ids, stream=stream).indices.tolist() == among.tolist()
    assert whole.tolist() != among.tolist()  # the noise of a column is that of its token


def test_rows_may_lie_apart():
    logits = logits_of(5, 900)
    expected = run(logits[:, :300].contiguous(), "reference")
    assert torch.equal(run(logits[:, :300], "triton").indices, expected.indices)
    reduced = run(logits[:, :300], "triton", torch.arange(300))
    assert torch.equal(reduced.indices, expected.indices)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(3)}, "logits must be float32"),
        ({"logits": torch.zeros(3, 9).double()}, "logits must be float32"),
        ({"keys": torch.zeros(2, dtype=torch.int64)}, r"keys must be int64 \[3\], one per row"),
        ({"positions": torch.zeros(3)}, r"positions must be int64 \[3\], one per row"),
        ({"token_ids": torch.arange(8)}, r"token_ids must be int64 \[9\], one per column"),
        ({"keys": torch.zeros(3, dtype=torch.int64, device="meta")}, "keys is on meta and logits on cpu"),
        ({"temperature": -1.0}, "temperature must be a finite number"),
        ({"implementation": "cuda"}, "implementation must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    keys, positions = rows_of(3)
    arguments = {"logits": torch.zeros(3, 9), "keys": keys, "positions": positions} | changed
    with pytest.raises(ValueError, match=message):
        draw(**arguments)
