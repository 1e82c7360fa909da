"""Uses vLLM's processing of logits without its drawing, and builds its output from our tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from atlas_kernels.dispatch import kernels_run_on
from atlas_rl.vllm.draw import DrawnTokens, scores


def draft_metadata(spec: Any, num_rows: int, device: torch.device) -> Any:
    """vLLM's metadata of the drafts, also for a step without drafts, for which vLLM before 0.32 makes none.

    Args:
        spec: vLLM's own metadata, or None.
        num_rows: Requests of the step.
        device: Device of the logits.
    """
    if spec is not None:
        return spec
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    rows = torch.arange(num_rows, dtype=torch.int32, device=device)
    nothing = rows[:0]
    return SpecDecodeMetadata(
        draft_token_ids=nothing,
        num_draft_tokens=[0] * num_rows,
        cu_num_draft_tokens=torch.zeros_like(rows),
        cu_num_sampled_tokens=rows + 1,
        target_logits_indices=nothing,
        bonus_logits_indices=rows,
        logits_indices=rows,  # vLLM has already selected these hidden states; its logits are not indexed again
    )


def processed_logits(
    sampler: Any, logits: torch.Tensor, spec: Any, metadata: Any, temperatures: np.ndarray
) -> tuple[torch.Tensor, bool]:
    """Logits of every position after vLLM's processing: `[positions, vocab]`, and whether some may be `-inf`.

    float32, or in their own type if nothing is processed and the kernel reads that type: a copy of the logits is the
    largest tensor of a step.

    Target and bonus logits are processed as in vLLM's rejection sampler, step by step. Its own `forward` would also
    draw, and it returns no processed logits if all requests are greedy.

    Args:
        sampler: vLLM's rejection sampler.
        logits: `[positions, vocab]`, logits of the policy.
        spec: vLLM's metadata of the drafts.
        metadata: vLLM's metadata of sampling.
        temperatures: float `[rows]`, the requests' temperatures. vLLM's own copy on the device would cost a wait.
    """
    if _untouched(metadata, temperatures):
        return logits if kernels_run_on(logits.device) else logits.float(), False
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
    from vllm.v1.sample.rejection_sampler import apply_sampling_constraints

    bonus, drafted = spec.bonus_logits_indices.long(), spec.target_logits_indices.long()
    processed = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    after_drafts = _with_drafts_in_minimal_lengths(metadata, spec.num_draft_tokens)
    own = sampler.sampler.apply_logits_processors(logits[bonus].float(), after_drafts, predict_bonus_token=True)
    if not metadata.all_greedy:
        own = sampler.sampler.apply_temperature(own, metadata.temperature, metadata.all_random)
        own = apply_top_k_top_p(own, metadata.top_k, metadata.top_p)
    processed[bonus] = own
    if len(drafted):
        own = sampler.apply_logits_processors(logits[drafted].float(), metadata, spec)
        processed[drafted] = apply_sampling_constraints(own, spec.cu_num_draft_tokens, metadata)
    return processed, True


def has_thinking_budgets(metadata: Any) -> bool:
    """Whether a running request limits its thinking. vLLM applies that limit at other tokens if there are drafts."""
    holder = metadata.thinking_budget_state_holder
    return holder is not None and holder.has_tracked_requests()


class _MinimalLengths:
    """vLLM's processor of minimal lengths, for logits after a request's drafts.

    vLLM's own counts committed tokens only. So it excludes ending tokens at a bonus position that lies beyond the minimum.
    """

    def __init__(self, own: Any, num_draft_tokens: Sequence[int]) -> None:
        self._own, self._num_draft_tokens = own, num_draft_tokens

    def is_argmax_invariant(self) -> bool:
        return self._own.is_argmax_invariant()

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Exclude ending tokens in row i of `[requests, vocab]` if request i is too short with its drafts."""
        own, by_request = self._own, self._own.min_toks
        try:
            own.min_toks = {
                i: (minimum - self._num_draft_tokens[i], *rest) for i, (minimum, *rest) in by_request.items()
            }
            return own.apply_with_spec_decode(logits, [1] * len(logits))
        finally:
            own.min_toks = by_request


def _with_drafts_in_minimal_lengths(metadata: Any, num_draft_tokens: Sequence[int]) -> Any:
    """vLLM's metadata with processors of minimal lengths that count the drafts, if this makes a difference."""
    processors = list(metadata.logitsprocs.all)
    if not any(num_draft_tokens[i] for own in processors for i in getattr(own, "min_toks", ())):
        return metadata
    from vllm.v1.sample.logits_processor import LogitsProcessors

    counting = [_MinimalLengths(own, num_draft_tokens) if hasattr(own, "min_toks") else own for own in processors]
    return dataclasses.replace(metadata, logitsprocs=LogitsProcessors(counting))


def _untouched(metadata: Any, temperatures: np.ndarray) -> bool:
    """Whether the processed distribution is the softmax of the unchanged logits."""
    return (
        (metadata.all_greedy or bool((temperatures == 1).all()))
        and metadata.top_k is None
        and metadata.top_p is None
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not any(getattr(processor, "min_toks", True) for processor in metadata.logitsprocs.all)
        and not has_thinking_budgets(metadata)
    )


def sampler_output(
    sampler: Any, logits: torch.Tensor, processed: torch.Tensor, drawn: DrawnTokens, num_logprobs: int | None
) -> Any:
    """vLLM's `SamplerOutput` of our tokens, with the requested logprobs (None for none).

    On the host, where vLLM needs them next. From the device, vLLM would fetch each of the four tensors separately.
    """
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    tokens = torch.from_numpy(drawn.token_ids.astype(np.int32))
    if num_logprobs is None:
        return SamplerOutput(tokens, None)
    scored = processed if sampler.is_processed_logprobs_mode else logits
    # If the scored logits are those drawn from, their normaliser is known, which saves a pass over the vocabulary.
    known = drawn.logprobs if scored is processed else None
    found = scores(scored, drawn, known, num_logprobs, as_logits=sampler.is_logits_logprobs_mode)
    return SamplerOutput(tokens, LogprobsTensors(*found))
