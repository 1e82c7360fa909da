"""Verification: decides from the policy's logits at every drafted position which tokens are committed.

Both forms go through the positions of the batch together: position 0 of every request, then position 1 of the requests
whose first draft was accepted, and so on. Positions after the first rejection are never processed, so the work over the
vocabulary is that of plain decoding for the same tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from atlas_kernels import noise
from atlas_kernels.dispatch import implementation_on
from atlas_kernels.draw import draw
from atlas_kernels.noise import Stream
from atlas_rl.core import Draft, SamplingParams, Sequences
from atlas_rl.policy.logits import require_distributions
from atlas_rl.policy.step_tail import StepTail
from atlas_rl.policy.upload import uploaded
from atlas_rl.sampling.processing import block_maxima, entropies, padded_prefixes, process


@dataclass(slots=True)
class Outcome:
    """Committed tokens of a batch of requests.

    Attributes:
        token_ids: int64 `[batch, draft_len + 1]`: accepted drafts, then the recovered or bonus token.
        num_accepted: int64 `[batch]`; `num_accepted + 1` tokens of a row are valid.
        logprobs: float32 `[batch, draft_len + 1]`, of the processed distribution.
        entropies: float32 `[batch, draft_len + 1]`, nats, of the processed distribution.
        max_probs: float32 `[batch, draft_len + 1]`, probability of the likeliest token.
    """

    token_ids: np.ndarray
    num_accepted: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    max_probs: np.ndarray


@dataclass(slots=True)
class Verifying:
    """A verification that has begun.

    Attributes:
        finish: Waits for the outcome.
        decided: Gives the decisions on the device: int64 `[num_positions]`, the policy's choice at every position, and
            int64 `[batch]`, accepted draft tokens. None if the host decides.
    """

    finish: Callable[[], Outcome]
    decided: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None


@dataclass(slots=True)
class Positions:
    """The positions of one round: one per request that is still being verified.

    Attributes:
        probs: float32 `[rows, vocab]`, processed probabilities.
        keys: uint64 `[rows]`, noise keys.
        indices: int64 `[rows]`, index in the whole sequence of the token being drawn.
        drafts: int64 `[rows]`, draft token of the position, -1 if there is none.
        draft_probs: float32 `[rows, vocab]`, the distribution the drafts were drawn from; None for one-hot drafts.
    """

    probs: torch.Tensor
    keys: np.ndarray
    indices: np.ndarray
    drafts: np.ndarray
    draft_probs: torch.Tensor | None


class Verifier(ABC):
    """Decides, position by position, whether a draft is accepted and which token replaces it otherwise.

    Whatever is drafted, the committed tokens have exactly the processed distribution of the policy.
    """

    couples_noise: bool
    """Whether drafters may draw with the noise that decides (`Stream.TARGET`)."""

    def keeps_logits(self, sampling: SamplingParams) -> bool:
        """Whether `verify` leaves logits as they are, at least in a batch with drafts."""
        return True

    @abstractmethod
    def decide(self, positions: Positions, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        """Committed token int64 `[rows]` and whether it is the accepted draft, bool `[rows]`."""

    def tail(self, draft: Draft, sequences: Sequences, requests: np.ndarray) -> StepTail | None:
        """`begin` as work that the forward may queue itself, asked for before it; None if it has to come afterwards."""
        return None

    def begin(
        self,
        logits: torch.Tensor,
        draft: Draft,
        sequences: Sequences,
        requests: np.ndarray,
        tail: StepTail | None = None,
    ) -> Verifying:
        """First part of `verify`, which does not wait for the device.

        The arguments must not be changed until the second part, `Verifying.finish`. `tail` is what was passed to the
        forward, whether it ran or not.
        """
        return Verifying(partial(self.verify, logits, draft, sequences, requests))

    def verify(self, logits: torch.Tensor, draft: Draft, sequences: Sequences, requests: np.ndarray) -> Outcome:
        """Verify packed drafts.

        The largest probability of every row, which the report needs, also shows whether the row is a distribution.

        Args:
            logits: float32 `[sum(draft.lengths + 1), vocab]`: request by request, the logits after its last committed
                token, then after each draft token. May be changed in place.
            draft: Drafts of the batch.
            sequences: All requests; `sequences.lengths` counts committed tokens only.
            requests: int64 `[batch]`.

        Raises:
            NonFiniteLogits: The policy's logits are not a distribution at a position that is reached.
        """
        sampling = sequences.sampling
        excludes = sampling.truncates or bool(sampling.suppress_tokens)
        batch, width = len(requests), int(draft.lengths.max(initial=0)) + 1
        first = np.cumsum(draft.lengths + 1) - (draft.lengths + 1)
        outcome = Outcome(
            np.zeros((batch, width), np.int64),
            np.zeros(batch, np.int64),
            *(np.zeros((batch, width), np.float32) for _ in range(3)),
        )
        going = np.arange(batch)
        for depth in range(width):
            rows = first[going] + depth
            taken = logits if len(rows) == len(logits) else logits[torch.from_numpy(rows).to(logits.device)]
            depths = np.full(len(going), depth)
            prefixes = prefixes_of(sequences, requests[going], draft, going, depths, logits.device)
            processed = process(taken, sampling, prefixes)
            probs = processed.softmax(dim=-1)
            max_probs = probs.amax(dim=-1).cpu().numpy()
            require_distributions(max_probs, processed)
            has_draft = draft.lengths[going] > depth
            drafts = np.full(len(going), -1, np.int64)
            if has_draft.any():
                drafts[has_draft] = draft.token_ids[going[has_draft], depth]
            draft_probs = None
            if draft.draft_probs is not None and depth < draft.draft_probs.shape[1]:
                draft_probs = draft.draft_probs[torch.from_numpy(going).to(logits.device), depth]
            keys, indices = sequences.noise_keys[requests[going]], sequences.lengths[requests[going]] + depth
            tokens, accepted = self.decide(Positions(probs, keys, indices, drafts, draft_probs), sampling)
            outcome.token_ids[going, depth] = tokens
            chosen = torch.from_numpy(tokens).to(logits.device)
            logprobs = probs.gather(1, chosen[:, None])[:, 0].log()
            outcome.logprobs[going, depth] = logprobs.cpu().numpy()
            outcome.entropies[going, depth] = entropies(processed, probs, chosen, logprobs, excludes)
            outcome.max_probs[going, depth] = max_probs
            outcome.num_accepted[going[accepted]] += 1
            going = going[accepted & ~sampling.ends(tokens)]  # after an ending token nothing is committed
            if not len(going):
                break
        return outcome


class DrafterInvariant(Verifier):
    """Drafter-invariant sampling (Daliri, Musco, Suresh, arXiv 2408.07978): a draft is accepted if it *is* the token.

    The policy's token at a position is `argmax p(x) / E(x)` with noise keyed by (seed, request, position, token), a
    function of prefix and seed alone. So one seed gives one text, whatever is drafted, trimmed or left out; a bug in a
    drafter can cost speed, never correctness. A drafter that draws with the same noise is accepted with probability at
    least `(1 - TV) / (1 + TV)` (their theorem 3), within a few points of the optimum `1 - TV` in practice.
    """

    couples_noise = True

    def decide(self, positions: Positions, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        tokens = choose(positions.probs, positions.keys, positions.indices, Stream.TARGET, sampling.greedy)
        return tokens, tokens == positions.drafts


class RejectionSampling(Verifier):
    """Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

    A draft x drawn from q is accepted with probability `min(1, p(x) / q(x))`; a rejected one is replaced by a draw from
    `(p - q)+`, normalised. For a one-hot draft: accepted with p(x), replaced by a draw from p without x. Acceptance and
    recovery use noise streams that no drafter draws from. What is drafted, how much and what is trimmed must depend on
    the prefix alone, never on the drawn token.
    """

    couples_noise = False

    def decide(self, positions: Positions, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        probs, drafts = positions.probs, torch.from_numpy(positions.drafts).to(positions.probs.device)
        if sampling.greedy:
            tokens = choose(probs, positions.keys, positions.indices, Stream.RECOVER, greedy=True)
            return tokens, tokens == positions.drafts
        keys = torch.from_numpy(positions.keys.view(np.int64)).to(probs.device)
        indices = torch.from_numpy(positions.indices).to(probs.device)
        has_draft = drafts >= 0
        column = drafts.clamp(min=0)[:, None]
        target = probs.gather(1, column)[:, 0].double()
        q = torch.zeros_like(probs)
        if positions.draft_probs is None:
            q.scatter_(1, column, has_draft[:, None].to(q.dtype))
        else:
            q = positions.draft_probs * has_draft[:, None]
        ratio = target / q.gather(1, column)[:, 0].double()
        accepted = (noise.uniforms(keys, indices, Stream.ACCEPT) < ratio) & has_draft
        residual = (probs - q).clamp(min=0)
        # If p == q, nothing is left to recover from, and every draft is accepted up to rounding: fall back to p.
        residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, probs)
        recovered = choose(residual, positions.keys, positions.indices, Stream.RECOVER, greedy=False)
        stands = accepted.cpu().numpy()
        return np.where(stands, positions.drafts, recovered), stands


def choose(probs: torch.Tensor, keys: np.ndarray, positions: np.ndarray, stream: Stream, greedy: bool) -> np.ndarray:
    """Draw one token per row: `argmax p(x) / E(x)`, or the likeliest token.

    Args:
        probs: float32 `[rows, vocab]`, need not be normalised.
        keys: uint64 `[rows]`.
        positions: int64 `[rows]`.
        stream: Noise stream.
        greedy: Take the likeliest token and draw nothing.

    Returns:
        int64 `[rows]`.
    """
    if greedy:
        return probs.argmax(dim=-1).cpu().numpy()
    if probs.device.type == "cpu":
        return noise.choose_rows(probs.contiguous().numpy(), block_maxima(probs).numpy(), keys, positions, int(stream))
    device = probs.device
    noise_of = uploaded(np.stack([keys.view(np.int64), positions]), device)
    return draw(probs.log(), *noise_of, stream=stream, implementation=implementation_on(device)).indices.cpu().numpy()


def prefixes_of(
    sequences: Sequences,
    requests: np.ndarray,
    draft: Draft,
    going: np.ndarray,
    depths: np.ndarray,
    device: torch.device,
) -> torch.Tensor | None:
    """Tokens before some positions, committed ones and then drafts; None if no penalty needs them.

    Args:
        sequences: All requests.
        requests: int64 `[rows]`.
        draft: The drafts.
        going: int64 `[rows]`, rows of the draft.
        depths: int64 `[rows]`, drafts before each position.
        device: Device of the result.

    Returns:
        As `padded_prefixes`.
    """
    if sequences.sampling.repetition_penalty == 1:
        return None
    _, first, row = np.unique(going, return_index=True, return_inverse=True)
    own, committed = requests[first], sequences.lengths[requests]
    width = int((committed + depths).max(initial=1))
    drafted = int(depths.max(initial=0))
    texts = np.zeros((len(own), width + drafted), np.int32)
    known = sequences.token_ids[own, :width]
    texts[:, : known.shape[1]] = known
    behind = sequences.lengths[own][:, None] + np.arange(drafted)
    np.put_along_axis(texts, behind, draft.token_ids[going[first], :drafted], axis=1)
    return padded_prefixes(texts[:, :width], row, committed + depths, device)


VERIFIERS: dict[str, type[Verifier]] = {"invariant": DrafterInvariant, "rejection": RejectionSampling}
