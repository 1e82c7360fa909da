"""Verifies drafts in one pass over the vocabulary, by the policy's own choice at every drafted position.

Drafter-invariant sampling (Daliri, Musco, Suresh, arXiv 2408.07978). With processed logits `l = logits / T` and the keyed
exponentials E of `atlas_kernels.noise`,

    choice = argmax_x l(x) - log E(x)          a draft is accepted exactly when it is the choice

A row's noise is never written out, and little of it is drawn: no score of a noise block of 128 tokens exceeds the
block's largest logit minus the log of its least exponential. So one Philox block serves 128 tokens, unless that bound
beats the best score so far. The softmax is not written out either: log-normaliser, entropy and largest probability come
from the same pass.

**Which choice.** Scores are float64 from float32 `l` and float32 E, in the kernel and in the reference. So both choose the
same token, and so does `atlas_kernels.noise.choose_rows`, which draws the same E, unless the two best scores differ by
less than its float32 probabilities resolve (about 1e-6, in log units). `l` is the correctly rounded float32 quotient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atlas_kernels.dispatch import Implementation, use_triton
from atlas_kernels.rows import PackedRows
from atlas_kernels.verify_reference import verify_reference


@dataclass(frozen=True, slots=True)
class Verification:
    """The token that every row of a packed batch draws. A request commits those of its first `num_accepted + 1` rows.

    Attributes:
        token_ids: int64 `[rows]`, the policy's own choice: the accepted draft, the recovered or the bonus token.
        num_accepted: int64 `[batch]`.
        logprobs: float32 `[rows]`, of the choice under the processed distribution.
        entropies: float32 `[rows]`, nats, of the processed distribution.
        max_probs: float32 `[rows]`, probability of the likeliest token.
    """

    token_ids: torch.Tensor
    num_accepted: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor
    max_probs: torch.Tensor


def verify(
    logits: torch.Tensor,
    draft_token_ids: torch.Tensor,
    row_starts: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float = 1.0,
    allowed: torch.Tensor | None = None,
    greedy: torch.Tensor | None = None,
    implementation: Implementation = "auto",
) -> Verification:
    """Verify packed drafts by drafter-invariant sampling. Does not read from the device.

    Args:
        logits: float32, bfloat16 or float16 `[rows, vocab]`: for each request, the logits after its last committed
            token, then after each of its drafts. The caller has applied penalties, and has made tokens that top-k,
            top-p or min-p exclude `-inf` or not `allowed`. Left unchanged. Above 1e8 in magnitude, float64 scores begin
            to lose the noise.
        draft_token_ids: int64 `[rows]`: the draft at the position that the row decides, -1 in a request's last row.
        row_starts: int64 `[batch + 1]`: request i has the rows `row_starts[i] .. row_starts[i + 1] - 1`, maybe none.
        keys: int64 `[rows]`, the bits of the noise keys (`request_keys(seed, ...)`).
        positions: int64 `[rows]`, index in the whole sequence of the drawn token. A row at a negative one is padding: the
            kernel does not read its logits, and its results mean nothing.
        temperature: `> 0`; 0 takes the likeliest token (the first of equals) and gives logprobs at temperature 1.
        allowed: bool `[rows, vocab]`; tokens that are False have probability zero. None allows all.
        greedy: bool `[rows]`, rows that take the likeliest token, as at temperature 0, but have figures at
            `temperature`. None draws every row.
        implementation: "auto" is the kernel on CUDA and the reference elsewhere.

    Returns:
        The choice of every row. A row that is no distribution, because it holds NaN or +inf or allows no token, has NaN
        in all figures and a meaningless token: check `max_probs` before using it.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    rows = PackedRows(logits, draft_token_ids, row_starts, keys, positions, temperature, allowed, greedy).checked()
    return decide(rows, implementation)


def decide(rows: PackedRows, implementation: Implementation) -> Verification:
    """`verify` for checked rows."""
    if use_triton(rows.logits, implementation):
        from atlas_kernels.verify_triton import verify_triton as run
    else:
        run = verify_reference
    return Verification(*run(rows))
