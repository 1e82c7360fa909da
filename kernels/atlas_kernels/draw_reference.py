"""The eager reference of `draw`: every score materialised, in float64."""

from __future__ import annotations

import torch

from atlas_kernels import noise
from atlas_kernels.draw_call import DrawCall
from atlas_kernels.verify_reference import first_argmax, noisy_scores, processed_logits


def draw_reference(call: DrawCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The fields of `atlas_kernels.draw.RowDraws`."""
    processed = processed_logits(call.logits, call.temperature, None)
    max_probs = processed.softmax(dim=-1).amax(dim=-1).float()
    if call.temperature == 0:
        return first_argmax(processed), max_probs
    if call.token_ids is None:
        return first_argmax(noisy_scores(processed, call.keys, call.positions, call.stream)), max_probs
    e = noise.exponentials_of(call.keys, call.positions, int(call.stream), call.token_ids)
    return first_argmax(processed - e.double().log()), max_probs
