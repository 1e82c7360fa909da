"""The eager reference of `draft_head`: step by step, with every score materialised."""

from __future__ import annotations

import torch
from torch.nn import functional

from atlas_kernels import noise
from atlas_kernels.head_call import DraftHeadWeights, HeadCall
from atlas_kernels.truncate_reference import truncate_reference
from atlas_kernels.verify_reference import first_argmax, processed_logits


def draft_head_reference(call: HeadCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The fields of `atlas_kernels.draft_head.HeadDraft`, step by step."""
    weights, state, newest = call.weights, call.state, call.newest
    indices, confidences, distributions = [], [], []
    for step in range(call.num_tokens):
        state = absorbed(weights, state, newest)
        log_weights = _processed(call, logits(weights, state))
        scores = log_weights
        if call.temperature > 0:
            e = noise.exponentials_of(call.keys, call.positions + step, int(call.stream), weights.token_ids)
            scores = log_weights - e.double().log()
        newest = first_argmax(scores)
        probs = log_weights.softmax(dim=-1)
        indices.append(newest)
        confidences.append(probs.amax(dim=-1).float())
        if call.with_probs:
            one_hot = functional.one_hot(newest, probs.shape[1])
            distributions.append((one_hot if call.temperature == 0 else probs).float())
    all_probs = torch.stack(distributions, dim=1) if call.with_probs else None
    return torch.stack(indices, dim=1), torch.stack(confidences, dim=1), all_probs


def _processed(call: HeadCall, x: torch.Tensor) -> torch.Tensor:
    """Logits of the distribution that tokens are drawn from: float64 `[batch, tokens]`."""
    if call.truncation is None:
        return processed_logits(x, call.temperature, None)
    return truncate_reference(x, call.truncation, call.temperature, torch.empty_like(x)).double()


def absorbed(weights: DraftHeadWeights, state: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    """The state after one more token: float32 `[batch, size]`."""
    own = product(state, weights.state_gates) + weights.state_bias.float()
    reset_in, update_in, new_in = weights.input_gates[newest].float().chunk(3, dim=-1)
    reset, update, new = own.chunk(3, dim=-1)
    new = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
    return torch.lerp(new, state, torch.sigmoid(update_in + update))


def logits(weights: DraftHeadWeights, state: torch.Tensor) -> torch.Tensor:
    """Logits over the reduced vocabulary: float32 `[batch, tokens]`."""
    # Default epsilon of torch's `rms_norm`.
    inverse = torch.rsqrt(state.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float32).eps)
    return product(state, weights.outputs) * inverse + weights.bias.float()


def product(state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`state @ weight.T`, with the state rounded to the weight's type and sums in float32."""
    return state.to(weight.dtype).float() @ weight.float().T
