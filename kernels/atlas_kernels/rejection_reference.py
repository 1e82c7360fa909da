"""The eager reference of `rejection`: both distributions materialised, in float64."""

from __future__ import annotations

import torch

from atlas_kernels import noise
from atlas_kernels.noise import Stream
from atlas_kernels.rows import PackedRows
from atlas_kernels.verify_reference import count_accepted, first_argmax, noisy_scores, processed_logits, summarise


def rejection_reference(
    rows: PackedRows, draft_probs: torch.Tensor | None, draft_vocab: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The fields of `atlas_kernels.verify.Verification`; arguments as in `atlas_kernels.rejection.verify_by_rejection`."""
    log_probs = processed_logits(rows.logits, rows.temperature, rows.allowed).log_softmax(dim=-1)
    probs = log_probs.exp()
    has_draft = rows.draft_token_ids >= 0
    column = rows.draft_token_ids.clamp(min=0)[:, None]
    q = torch.zeros_like(probs)
    if draft_probs is None or draft_vocab is None:
        q.scatter_(1, column, 1.0)
    else:
        q[:, draft_vocab] = draft_probs.double()
    # A row without a draft draws from p: nothing is subtracted, whatever its draft probabilities hold.
    q = torch.where(has_draft[:, None], q, 0.0)
    uniforms = noise.uniforms(rows.keys, rows.positions, int(Stream.ACCEPT))
    stands = uniforms * q.gather(1, column)[:, 0] < probs.gather(1, column)[:, 0]
    residual = (probs - q).clamp(min=0).nan_to_num(0.0)  # NaN if no token is allowed
    stands = has_draft & (stands | (residual.amax(dim=-1) == 0))
    recovered = first_argmax(noisy_scores(residual.log(), rows.keys, rows.positions, Stream.RECOVER))
    token_ids = torch.where(stands, rows.draft_token_ids, recovered)
    return token_ids, count_accepted(stands, rows.row_starts), *summarise(log_probs, token_ids)
