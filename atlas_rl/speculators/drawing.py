"""Draws draft tokens from a drafter's logits: over a reduced vocabulary (learned heads) or the policy's whole one (LMs)."""

from __future__ import annotations

from dataclasses import replace

import numba
import numpy as np
import torch

from atlas_kernels import noise
from atlas_kernels.dispatch import Implementation
from atlas_kernels.draft_head import draft_head
from atlas_kernels.head_call import DraftHeadWeights
from atlas_rl.core import Draft, Sequences
from atlas_rl.sampling.processing import process
from atlas_rl.sampling.verification import choose

_CONFIDENCE = (0.01, 0.99)


class NonFiniteDraft(ValueError):
    """A drafter gave logits that are no distribution: it cannot draft until it has other weights. The policy can go on."""


class ReducedDraft:
    """Draws draft tokens under the call's sampling parameters.

    Args:
        drafter: The speculator's name, for errors.
        sequences: All requests of the call.
        requests: int64 `[batch]`.
        depth: Draft tokens per request, for all alike.
        token_ids: int64 `[reduced vocab]`, the policy's ids.
        couples_noise: Draw with the policy's own noise; otherwise independently, and keep the probabilities.
        argmax: Take the likeliest token instead of drawing.
    """

    def __init__(
        self,
        drafter: str,
        sequences: Sequences,
        requests: np.ndarray,
        depth: int,
        token_ids: np.ndarray,
        *,
        couples_noise: bool,
        argmax: bool = False,
    ) -> None:
        # A penalty would need the whole prefix at every drafted token: left out, it costs acceptance and nothing else.
        self._sampling = replace(sequences.sampling, repetition_penalty=1.0)
        self._drafter = drafter
        self._sequences, self._requests, self._token_ids = sequences, requests, token_ids
        self._stream, self._keys = sequences.draft_noise(requests, couples_noise)
        self._couples_noise, self._likeliest = couples_noise, argmax or sequences.sampling.greedy
        self._position = 0
        self._probs: list[torch.Tensor] = []
        self.token_ids = np.zeros((len(requests), depth), np.int64)
        self._confidence = np.zeros((len(requests), depth), np.float32)

    def draw(self, logits: torch.Tensor) -> np.ndarray:
        """The next token of every request: int64 `[batch]`, indices into the reduced vocabulary.

        Args:
            logits: `[batch, reduced vocab]`; may be changed in place.

        Raises:
            NonFiniteDraft: The largest probability of a row, which is its confidence, is NaN.
        """
        q = process(logits.float(), self._sampling, None).softmax(dim=-1)
        self._confidence[:, self._position] = _max_probs(q.amax(dim=-1), self._drafter).clip(*_CONFIDENCE)
        chosen = self._choose(q)
        self.token_ids[:, self._position] = self._token_ids[chosen]
        if not self._couples_noise:
            self._probs.append(_one_hot(chosen, q) if self._likeliest else q)
        self._position += 1
        return chosen

    @property
    def by_kernel(self) -> bool:
        """Whether the draft head kernel draws as this call samples: it truncates nothing."""
        return not self._sampling.truncates and self._likeliest == self._sampling.greedy

    def draw_all(
        self,
        weights: DraftHeadWeights,
        state: torch.Tensor,
        newest: torch.Tensor,
        implementation: Implementation = "auto",
    ) -> None:
        """All tokens of every request, by the draft head kernel; arguments as in `atlas_kernels.draft_head.draft_head`.

        Raises:
            NonFiniteDraft: As in `draw`.
        """
        drawn = draft_head(
            weights,
            state,
            newest,
            torch.from_numpy(self._keys.view(np.int64)).to(state.device),
            torch.from_numpy(self._sequences.lengths[self._requests]).to(state.device),
            self.token_ids.shape[1],
            temperature=0.0 if self._sampling.greedy else self._sampling.temperature,
            stream=self._stream,
            with_probs=not self._couples_noise,
            implementation=implementation,
        )
        self._confidence[:] = _max_probs(drawn.confidence, self._drafter).clip(*_CONFIDENCE)
        self.token_ids[:] = self._token_ids[drawn.indices.cpu().numpy()]
        self._probs = [] if drawn.probs is None else list(drawn.probs.unbind(dim=1))

    def finish(self, max_draft_tokens: np.ndarray) -> Draft:
        """The draft, each row cut to int64 `[batch]` tokens and behind its first ending token."""
        ends = self._sequences.sampling.ends(self.token_ids)
        lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, self.token_ids.shape[1])
        draft_probs = None
        if self._probs:
            stacked = torch.stack(self._probs, dim=1)
            draft_probs = stacked.new_zeros(*self.token_ids.shape, self._sequences.vocab_size)
            draft_probs[:, :, torch.from_numpy(self._token_ids).to(stacked.device)] = stacked
        return Draft(self.token_ids, np.minimum(max_draft_tokens, lengths), self._confidence, draft_probs)

    def _choose(self, q: torch.Tensor) -> np.ndarray:
        if self._likeliest:
            return q.argmax(dim=-1).cpu().numpy()
        positions = self._sequences.lengths[self._requests] + self._position
        if q.device.type == "cpu":
            return choose_among(q.numpy(), self._token_ids, self._keys, positions, int(self._stream))
        device_keys = torch.from_numpy(self._keys.view(np.int64)).to(q.device)
        device_ids = torch.from_numpy(self._token_ids).to(q.device)
        e = noise.exponentials_of(device_keys, torch.from_numpy(positions).to(q.device), self._stream, device_ids)
        return (q / e).argmax(dim=-1).cpu().numpy()


def draw_full(
    drafter: str,
    logits: torch.Tensor,
    sequences: Sequences,
    requests: np.ndarray,
    drafted: np.ndarray,
    *,
    couples_noise: bool,
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """The next draft token of some requests, under the sampling parameters of the call.

    Args:
        drafter: The speculator's name, for errors.
        logits: float32 `[batch, vocab]`; may be changed in place.
        sequences: All requests of the call.
        requests: int64 `[batch]`.
        drafted: int64 `[batch, position]`, the draft tokens before this one.
        couples_noise: Draw with the policy's own noise; otherwise independently.

    Returns:
        Tokens int64 `[batch]`, confidences float32 `[batch]`, and the distribution they were drawn from, float32
        `[batch, vocab]`. A confidence is the largest probability: a function of the prefix alone, for either verification.

    Raises:
        NonFiniteDraft: The largest probability of a row is NaN.
    """
    sampling, prefixes = sequences.sampling, None
    if sampling.repetition_penalty != 1:
        prefixes = [
            torch.from_numpy(np.unique(np.append(sequences.token_ids[r, : sequences.lengths[r]], row)))
            .long()
            .to(logits.device)
            for r, row in zip(requests, drafted, strict=True)
        ]
    probs = process(logits, sampling, prefixes).softmax(dim=-1)
    confidence = _max_probs(probs.amax(dim=-1), drafter)
    stream, keys = sequences.draft_noise(requests, couples_noise)
    positions = sequences.lengths[requests] + drafted.shape[1]
    tokens = choose(probs, keys, positions, stream, sampling.greedy)
    if sampling.greedy:
        probs = torch.nn.functional.one_hot(torch.from_numpy(tokens).to(probs.device), probs.shape[1]).to(probs)
    return tokens, confidence, probs


@numba.njit(cache=True, nogil=True)
def choose_among(probs, token_ids, keys, positions, stream):
    """`argmax p(x) / E(x)` of every row over some tokens.

    Args:
        probs: float32 `[rows, tokens]`.
        token_ids: int64 `[tokens]`, whose noise counts.
        keys: uint64 `[rows]`.
        positions: int64 `[rows]`.
        stream: The noise stream.

    Returns:
        int64 `[rows]`, indices into `token_ids`.
    """
    choice = np.zeros(len(probs), np.int64)
    for row in range(len(probs)):
        best = -1.0
        for index in range(len(token_ids)):
            p = probs[row, index]
            if p > 0:
                score = p / noise.exponential(keys[row], positions[row], token_ids[index], stream)
                if score > best:
                    best, choice[row] = score, index
    return choice


def _max_probs(max_probs: torch.Tensor, drafter: str) -> np.ndarray:
    """The largest probabilities of rows of draft logits, on the host: NaN where the logits are no distribution."""
    found = max_probs.cpu().numpy()
    if np.isnan(found).any():
        raise NonFiniteDraft(
            f"the draft logits of '{drafter}' are not finite. The policy's tokens are not affected. Likely causes: weights "
            "of the drafter that are NaN or infinite, or an overflow. Load or train it anew, or leave it out"
        )
    return found


def _one_hot(index: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(index).to(like.device), like.shape[1]).to(like)
