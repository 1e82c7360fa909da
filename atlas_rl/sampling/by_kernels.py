"""Verification by kernels: all positions of all requests at once; the eager forms go position by position.

Positions after a first rejection are computed in vain, in exchange for one launch instead of a host round trip per
position. If nothing but the temperature is to be applied to the logits, the policy's step takes the kernels along
(`queued.py`). The decisions equal those of `verification.py` (`docs/kernels.md` gives the tolerance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from atlas_kernels.dispatch import Implementation, kernels_run_on
from atlas_kernels.rejection import verify_by_rejection
from atlas_kernels.verify import Verification, verify
from atlas_rl.core import Draft, SamplingParams, Sequences
from atlas_rl.policy.logits import require_distributions
from atlas_rl.policy.step_tail import StepTail
from atlas_rl.policy.upload import begin_download, upload
from atlas_rl.sampling.packing import packed_positions, unpacked
from atlas_rl.sampling.processing import process
from atlas_rl.sampling.queued import QueuedVerification
from atlas_rl.sampling.verification import (
    DrafterInvariant,
    Outcome,
    Positions,
    RejectionSampling,
    Verifier,
    Verifying,
    prefixes_of,
)


def verifier_on(device: torch.device, form: Verifier) -> Verifier:
    """The kernel version of `form` if kernels support it on `device`, else `form`."""
    if kernels_run_on(device) and type(form) in (DrafterInvariant, RejectionSampling):
        return FusedVerifier(form)
    return form


class FusedVerifier(Verifier):
    """Verification by kernels, for one form.

    Args:
        form: Drafter-invariant or rejection sampling.
        implementation: Passed to the kernels.
    """

    def __init__(self, form: Verifier, implementation: Implementation = "auto") -> None:
        self.couples_noise = form.couples_noise
        self._form, self._implementation = form, implementation
        self._sampling: SamplingParams | None = None  # those that the next two belong to
        self._temperature, self._processed = 0.0, False
        self._joins = True  # whether steps may take verification along

    def keeps_logits(self, sampling: SamplingParams) -> bool:
        return not _is_processed(sampling)

    def decide(self, positions: Positions, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        return self._form.decide(positions, sampling)

    def verify(self, logits: torch.Tensor, draft: Draft, sequences: Sequences, requests: np.ndarray) -> Outcome:
        return self.begin(logits, draft, sequences, requests).finish()

    def tail(self, draft: Draft, sequences: Sequences, requests: np.ndarray) -> StepTail | None:
        """Verification as part of the forward; None if draft probabilities or processed logits keep it outside.

        After the first draft with probabilities no step of the call has a tail: each size would be captured twice.
        """
        if sequences.sampling is not self._sampling:
            self._follow(sequences.sampling)
        self._joins = self._joins and (self.couples_noise or not self._temperature or not _has_probs(draft))
        if not self._joins:
            return None
        launch = partial(self._launch, probs=None, temperature=self._temperature)
        key = self.couples_noise, self._temperature, self._implementation
        return QueuedVerification(draft, sequences, requests, launch, key)

    def begin(
        self,
        logits: torch.Tensor,
        draft: Draft,
        sequences: Sequences,
        requests: np.ndarray,
        tail: StepTail | None = None,
    ) -> Verifying:
        sampling, device = sequences.sampling, logits.device
        if isinstance(tail, QueuedVerification) and tail.result is not None:
            outcome = partial(_outcome, tail.begin_download(), logits, tail.starts, sampling)
            return Verifying(outcome, tail.decided)
        packed = packed_positions(requests, sequences.lengths, sequences.noise_keys, draft.token_ids, draft.lengths)
        drafts, starts, keys, positions, row, depth = packed
        if sampling is not self._sampling:
            self._follow(sampling)
        if self._processed:
            prefixes = prefixes_of(sequences, requests[row], draft, row, depth, device)
            logits = process(logits, sampling, prefixes)
        rows = [logits, *upload([drafts, starts, keys, positions], device)]
        probs = None if self.couples_noise or not _has_probs(draft) else _packed_probs(draft, row, depth)
        verified = self._launch(rows, probs, self._temperature)
        results = verified.num_accepted, verified.token_ids, verified.logprobs, verified.entropies, verified.max_probs
        # Before anything else is queued: the host waits for no later work.
        outcome = partial(_outcome, begin_download(results), logits, starts, sampling)
        return Verifying(outcome, lambda: (verified.token_ids, verified.num_accepted))

    def _follow(self, sampling: SamplingParams) -> None:
        """Read the sampling parameters of a call."""
        self._sampling = sampling
        self._temperature, self._processed = kernel_temperature(sampling), _is_processed(sampling)
        self._joins = not self._processed

    def _launch(self, rows: list[torch.Tensor], probs: torch.Tensor | None, temperature: float) -> Verification:
        """Launch the kernel over packed rows; `probs` are those of drawn drafts, for rejection sampling."""
        if self.couples_noise:
            return verify(*rows, temperature=temperature, implementation=self._implementation)
        return verify_by_rejection(
            *rows, temperature=temperature, draft_probs=probs, implementation=self._implementation
        )

    def compile_for(self, sampling: SamplingParams, vocab_size: int, device: torch.device) -> None:
        """Run the kernels of `verify` on one row without a draft; see `decode/compile_kernels.py`."""
        none, zero = (torch.full((1,), number, device=device, dtype=torch.int64) for number in (-1, 0))
        logits = torch.zeros(1, vocab_size, device=device, dtype=torch.float32)
        if sampling.truncates:
            logits = process(logits, replace(sampling, repetition_penalty=1.0), None)
        rows = logits, none, torch.tensor([0, 1], device=device), zero, zero
        temperature = kernel_temperature(sampling)
        if self.couples_noise:
            verify(*rows, temperature=temperature, implementation=self._implementation)
            return
        for probs in (None, torch.zeros(1, vocab_size, device=device, dtype=torch.float32)):
            verify_by_rejection(*rows, temperature=temperature, draft_probs=probs, implementation=self._implementation)


def kernel_temperature(sampling: SamplingParams) -> float:
    """The temperature that kernels still have to apply; 0 is greedy."""
    if sampling.greedy:
        return 0.0
    return 1.0 if _is_processed(sampling) else sampling.temperature


def _is_processed(sampling: SamplingParams) -> bool:
    """Whether torch applies truncation, penalties, suppression and the temperature before the kernels run."""
    return sampling.truncates or sampling.repetition_penalty != 1 or bool(sampling.suppress_tokens)


def _has_probs(draft: Draft) -> bool:
    return draft.draft_probs is not None and bool(draft.draft_probs.shape[1])


def _packed_probs(draft: Draft, row: np.ndarray, depth: np.ndarray) -> torch.Tensor:
    """Draft probabilities of every row, float32 `[rows, vocab]`; rows without a draft are undefined."""
    assert draft.draft_probs is not None
    device = draft.draft_probs.device
    column = np.minimum(depth, draft.draft_probs.shape[1] - 1)
    there = upload([row, column], device)
    return draft.draft_probs[there[0], there[1]]


def _outcome(
    fetched: Callable[[], list[np.ndarray]], logits: torch.Tensor, starts: np.ndarray, sampling: SamplingParams
) -> Outcome:
    """Packed results as one row per request, with zeros after the committed tokens.

    They also show whether the logits were distributions.
    """
    num_accepted, *results = fetched()
    tokens, logprobs, entropies, max_probs, counts, numbers = unpacked(starts, num_accepted, *results, sampling.stops)
    if not numbers:
        require_distributions(results[3][counts], logits, np.flatnonzero(counts))
    return Outcome(tokens, num_accepted, logprobs, entropies, max_probs)
