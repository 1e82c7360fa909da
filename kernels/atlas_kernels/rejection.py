"""Verification by rejection sampling, for engines and drafters whose noise is not shared.

Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318), as in
`atlas_rl.sampling.verification.RejectionSampling`: a draft x drawn from q is accepted with probability
`min(1, p(x) / q(x))`; else another token is drawn from `(p - q)+`, normalised. Without draft probabilities drafts are
one-hot: x is accepted with probability p(x); else a draw from p without x replaces it.

**Passes.** One-hot drafts take one pass over the vocabulary. It always draws the replacement among the other tokens,
whether or not the draft is accepted, and needs no normaliser for that. Draft probabilities over a reduced vocabulary
take two passes. The first draws among the tokens outside of that vocabulary, where q is 0 and `(p - q)+` is p. The
second gathers the logits of the reduced vocabulary and draws from `exp(l - m) - q sum exp(l - m)`, which needs the
first pass's sums. The better score of the two is the draw.

If `(p - q)+` is zero everywhere, q is p up to rounding, and the draft is accepted.
"""

from __future__ import annotations

import torch

from atlas_kernels.dispatch import Implementation, use_triton
from atlas_kernels.rejection_reference import rejection_reference
from atlas_kernels.rows import PackedRows
from atlas_kernels.verify import Verification, decide


def verify_by_rejection(
    logits: torch.Tensor,
    draft_token_ids: torch.Tensor,
    row_starts: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float = 1.0,
    allowed: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    draft_vocab: torch.Tensor | None = None,
    implementation: Implementation = "auto",
) -> Verification:
    """Verify packed drafts by rejection. Does not read from the device.

    Args:
        logits: As in `verify`; so are the next four, `temperature`, `allowed` and `implementation`. At temperature 0
            both forms are the same.
        draft_token_ids: As in `verify`.
        row_starts: As in `verify`.
        keys: As in `verify`; the streams are those of acceptance and recovery, which no drafter draws from.
        positions: As in `verify`.
        temperature: As in `verify`.
        allowed: As in `verify`.
        draft_probs: float32 `[rows, draft_vocab]`, the distribution each draft was drawn from; rows without a draft are
            not read. None for one-hot drafts.
        draft_vocab: int64 `[draft_vocab]`, distinct token ids of the columns of `draft_probs`; None for the whole
            vocabulary in order. Other tokens have draft probability 0.
        implementation: As in `verify`.

    Returns:
        The tokens to commit. `token_ids` has the draft if it is accepted, else the recovered token, and in a request's
        last row the bonus token. Ignore rows after the first rejection. Rows that are no distribution are as in
        `verify`.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    rows = PackedRows(logits, draft_token_ids, row_starts, keys, positions, temperature, allowed).checked()
    if temperature == 0:
        return decide(rows, implementation)
    draft_vocab = _checked_vocab(logits, draft_probs, draft_vocab)
    if use_triton(logits, implementation):
        from atlas_kernels.rejection_triton import rejection_triton as run
    else:
        run = rejection_reference
    return Verification(*run(rows, draft_probs, draft_vocab))


def _checked_vocab(
    logits: torch.Tensor, draft_probs: torch.Tensor | None, draft_vocab: torch.Tensor | None
) -> torch.Tensor | None:
    """Checks `draft_probs` and its token ids; returns the ids of its columns. Raises `ValueError`."""
    if draft_probs is None:
        if draft_vocab is not None:
            raise ValueError("draft_vocab names the columns of draft_probs: pass both, or neither for one-hot drafts")
        return None
    if draft_vocab is None:
        draft_vocab = torch.arange(logits.shape[1], device=logits.device)
    if draft_vocab.ndim != 1 or draft_vocab.dtype != torch.int64 or draft_vocab.device != logits.device:
        raise ValueError(
            f"draft_vocab must be int64 [draft_vocab] on {logits.device}, "
            f"got {draft_vocab.dtype} {list(draft_vocab.shape)} on {draft_vocab.device}"
        )
    shape = (len(logits), len(draft_vocab))
    if draft_probs.shape != shape or draft_probs.dtype != torch.float32 or draft_probs.device != logits.device:
        raise ValueError(
            f"draft_probs must be float32 {list(shape)} on {logits.device}, "
            f"got {draft_probs.dtype} {list(draft_probs.shape)} on {draft_probs.device}"
        )
    return draft_vocab
