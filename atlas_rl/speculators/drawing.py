"""Draws draft tokens from a drafter's logits: over the policy's whole vocabulary (LMs) or a reduced one (learned heads).

On a GPU, each wait of the host costs as much as a small drafter's forward. So drawn tokens stay on the device, where the
drafter's next forward reads them, and the host gets all tokens of a draft at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from atlas_kernels import noise
from atlas_kernels.dispatch import Implementation, implementation_on
from atlas_kernels.draft_head import draft_head
from atlas_kernels.draw import draw
from atlas_kernels.head_call import DraftHeadWeights
from atlas_kernels.jit_cache import cached_njit
from atlas_rl.core import Draft, Sequences
from atlas_rl.counts import bounds
from atlas_rl.policy.upload import download, uploaded
from atlas_rl.sampling.processing import padded_prefixes, process
from atlas_rl.sampling.verification import choose
from atlas_rl.speculators.drawn_rows import cut, positions_alike

_UNKNOWN = 0.5  # confidence of positions where nothing was drawn
_RUNS_ALL = np.zeros(0, np.bool_)  # no token is unrunnable


class NonFiniteDraft(ValueError):
    """A drafter's logits are no distribution: it cannot draft until its weights change. The policy is not affected."""


@dataclass(slots=True)
class _Position:
    """One position of a draft: int64 `[n]` each, on the device except `rows`.

    Attributes:
        rows: Requests that have this position, as indices into the draft's requests.
        index: The same on the device.
        keys: Noise keys, the bits of uint64 numbers.
        at: Index of the drawn token in the whole sequence.
        stayed: Indices of these requests among those of the previous position.
    """

    rows: np.ndarray
    index: torch.Tensor
    keys: torch.Tensor
    at: torch.Tensor
    stayed: torch.Tensor


class Drawing:
    """The draft of some requests, drawn position by position under the call's sampling parameters.

    Args:
        drafter: The speculator's name, for errors.
        sequences: All requests of the call.
        requests: int64 `[batch]`.
        depths: int64 `[batch]`, draft tokens of each request; at least one of them is positive.
        device: Device of the logits. All inputs known beforehand are uploaded at once.
        couples_noise: Draw with the policy's own noise; otherwise independently, and keep the probabilities.
        token_ids: int64 `[reduced vocab]` on the device, the policy's ids; None for the whole vocabulary.
        argmax: Take the likeliest token instead of drawing.
        carried: int64 arrays of the drafter's own, uploaded with the rest.

    Attributes:
        rows: Per position int64 `[n]`, the requests that have it, as indices into `requests`.
        carried: The drafter's own arrays, on the device.
    """

    def __init__(
        self,
        drafter: str,
        sequences: Sequences,
        requests: np.ndarray,
        depths: np.ndarray,
        device: torch.device,
        *,
        couples_noise: bool,
        token_ids: torch.Tensor | None = None,
        argmax: bool = False,
        carried: Sequence[np.ndarray] = (),
    ) -> None:
        sampling = sequences.sampling
        if token_ids is not None and sampling.repetition_penalty != 1:
            # A penalty would need the whole prefix in the reduced vocabulary: leaving it out costs only acceptance.
            sampling = replace(sampling, repetition_penalty=1.0)
        self._drafter, self._sampling, self._sequences = drafter, sampling, sequences
        self._depths, self._token_ids, self._device = depths, token_ids, device
        self._couples_noise, self._likeliest = couples_noise, argmax or sampling.greedy
        self._stream, keys = sequences.draft_noise(requests, couples_noise)
        shallowest, deepest = bounds(depths)
        self._uniform = shallowest == deepest
        if self._uniform:
            self.rows = [np.arange(len(depths))] * deepest
            lay_out = _laid_out_alike
        else:
            self.rows = [np.flatnonzero(depths > position) for position in range(deepest)]
            lay_out = _laid_out
        self._positions, self.carried = lay_out(self.rows, keys, sequences.lengths, requests, carried, device)
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None  # all tokens drawn at once: see `take`
        self._indices: list[torch.Tensor] = []  # drawn so far, by position, like the next two
        self._max_probs: list[torch.Tensor] = []
        self._probs: list[torch.Tensor] = []
        self._prefixes: torch.Tensor | None = None  # prefixes of the next position
        if sampling.repetition_penalty != 1:
            own, lengths = requests[self.rows[0]], sequences.lengths[requests[self.rows[0]]]
            texts = sequences.token_ids[own, : int(lengths.max())]
            self._prefixes = padded_prefixes(texts, np.arange(len(own)), lengths, device)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw the next token of every request that has this position.

        Args:
            logits: `[n, vocab]`, or over the reduced vocabulary; may be changed in place. Rows are those of `rows`.

        Returns:
            int64 `[m]` on the device: token ids, or indices into the reduced vocabulary, of the requests that have
            another position (at the last position: of all).
        """
        position = self._positions[len(self._indices)]
        by = self._by_numba if logits.device.type == "cpu" else self._by_kernel
        indices, max_probs, probs = by(logits, position)
        self._indices.append(indices)
        self._max_probs.append(max_probs)
        if not self._couples_noise:
            self._probs.append(_one_hot(indices, logits) if probs is None else probs)
        if len(self._indices) == len(self._positions):
            return indices
        following = self._positions[len(self._indices)]
        if len(following.rows) < len(position.rows):
            indices = indices.index_select(0, following.stayed)
            if self._prefixes is not None:
                self._prefixes = self._prefixes.index_select(0, following.stayed)
        if self._prefixes is not None:
            self._prefixes = torch.cat([self._prefixes, indices[:, None]], dim=1)
        return indices

    @property
    def by_kernel(self) -> bool:
        """Whether the draft head kernel can draw for this call: at temperature 0 it only takes the likeliest token."""
        return self._likeliest == self._sampling.greedy

    def draw_all(
        self,
        weights: DraftHeadWeights,
        state: torch.Tensor,
        newest: torch.Tensor,
        implementation: Implementation = "auto",
    ) -> None:
        """Draw all tokens by the draft head kernel; arguments as in `atlas_kernels.draft_head.draft_head`."""
        drawn = draft_head(
            weights,
            state,
            newest,
            self._positions[0].keys,
            self._positions[0].at,
            len(self._positions),
            temperature=0.0 if self._sampling.greedy else self._sampling.temperature,
            truncation=self._sampling.truncation if self._sampling.truncates else None,
            stream=self._stream,
            with_probs=not self._couples_noise,
            implementation=implementation,
        )
        self.take(drawn.indices, drawn.confidence)
        self._probs = [] if drawn.probs is None else list(drawn.probs.unbind(dim=1))

    def take(self, indices: torch.Tensor, max_probs: torch.Tensor) -> None:
        """Take tokens of all requests that were drawn elsewhere.

        Args:
            indices: int64 `[batch, depth]`, token ids, or indices into the reduced vocabulary.
            max_probs: float32 `[batch, depth]`, largest probabilities.
        """
        self._whole = indices, max_probs

    def finish(self, max_draft_tokens: np.ndarray, unrunnable: np.ndarray | None = None) -> Draft:
        """Finish the draft and copy it to the host in one download.

        Args:
            max_draft_tokens: int64 `[batch]`, where each row is cut. Rows are also cut after their first ending token.
            unrunnable: bool `[vocab]`, tokens that rows are cut after as well; None if there are none.

        Raises:
            NonFiniteDraft: The largest probability of a row (its confidence) is NaN.
        """
        drawn, sure = self._fetched()
        sampling, depths = self._sequences.sampling, self._depths
        most = np.ascontiguousarray(np.minimum(max_draft_tokens, depths), np.int64)
        tokens, confidence, lengths, finite = cut(
            drawn, sure, most, sampling.stops, _RUNS_ALL if unrunnable is None else unrunnable
        )
        if not finite:
            raise NonFiniteDraft(
                f"the draft logits of '{self._drafter}' are not finite. The policy's tokens are not affected. Likely "
                "causes: weights of the drafter that are NaN or infinite, or an overflow. Load or train it anew, or leave "
                "it out"
            )
        # A row's largest probability is NaN if any of them is.
        return Draft(tokens, lengths, confidence, self._draft_probs(), probs_are_checked=True)

    def _fetched(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 and largest probabilities float32 `[batch, depth]`."""
        if self._whole is not None:
            indices, max_probs = self._whole
        elif self._uniform:
            indices, max_probs = torch.stack(self._indices, dim=1), torch.stack(self._max_probs, dim=1)
        else:
            indices, max_probs = torch.cat(self._indices), torch.cat(self._max_probs)
        drawn, sure = download([indices if self._token_ids is None else self._token_ids[indices], max_probs])
        if drawn.ndim == 2:
            return np.ascontiguousarray(drawn, np.int64), np.ascontiguousarray(sure, np.float32)
        batch, depth = len(self._depths), len(self.rows)
        row, column = np.concatenate(self.rows), np.repeat(np.arange(depth), [len(rows) for rows in self.rows])
        tokens, confidence = np.zeros((batch, depth), np.int64), np.full((batch, depth), _UNKNOWN, np.float32)
        tokens[row, column], confidence[row, column] = drawn, sure
        return tokens, confidence

    def _draft_probs(self) -> torch.Tensor | None:
        """Distributions that tokens were drawn from, float32 `[batch, depth, vocab]`; None for coupled draws."""
        if not self._probs:
            return None
        batch = len(self._depths)
        everybody = len(self.rows[-1]) == batch  # all requests have all positions
        if everybody and self._token_ids is None:
            return torch.stack(self._probs, dim=1)
        draft_probs = self._probs[0].new_zeros(batch, len(self.rows), self._sequences.vocab_size)
        if everybody:
            draft_probs[:, :, self._token_ids] = torch.stack(self._probs, dim=1)
            return draft_probs
        for column, (position, probs) in enumerate(zip(self._positions, self._probs, strict=True)):
            if self._token_ids is None:
                draft_probs[position.index, column] = probs
            else:
                draft_probs[position.index[:, None], column, self._token_ids] = probs
        return draft_probs

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        return process(logits.float(), self._sampling, self._prefixes)

    def _by_kernel(
        self, logits: torch.Tensor, position: _Position
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Indices, largest probabilities, and all probabilities if they are kept and not one-hot."""
        keeps = not self._couples_noise and not self._likeliest
        temperature = 0.0 if self._likeliest else self._sampling.temperature
        if keeps or self._prefixes is not None or self._sampling.truncates or self._likeliest != self._sampling.greedy:
            logits, temperature = self._processed(logits), 0.0 if self._likeliest else 1.0
        drawn = draw(
            logits,
            position.keys,
            position.at,
            temperature=temperature,
            stream=self._stream,
            token_ids=self._token_ids,
            implementation=implementation_on(logits.device),
        )
        return drawn.indices, drawn.max_probs, logits.softmax(dim=-1) if keeps else None

    def _by_numba(
        self, logits: torch.Tensor, position: _Position
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As `_by_kernel`, on a CPU."""
        probs = self._processed(logits).softmax(dim=-1)
        keys, at = position.keys.numpy().view(np.uint64), position.at.numpy()
        if self._likeliest:
            indices = probs.argmax(dim=-1)
        elif self._token_ids is None:
            indices = torch.from_numpy(choose(probs, keys, at, self._stream, greedy=False))
        else:
            ids = self._token_ids.numpy()
            indices = torch.from_numpy(choose_among(probs.numpy(), ids, keys, at, int(self._stream)))
        return indices, probs.amax(dim=-1), None if self._likeliest else probs


def _laid_out(
    rows: Sequence[np.ndarray],
    keys: np.ndarray,
    lengths: np.ndarray,
    requests: np.ndarray,
    carried: Sequence[np.ndarray],
    device: torch.device,
) -> tuple[list[_Position], list[torch.Tensor]]:
    """The positions of a draft after committed tokens (int64 `[num_requests]`), and `carried`; one upload."""
    parts: list[np.ndarray] = []
    for position, row in enumerate(rows):
        stayed = np.searchsorted(rows[max(position - 1, 0)], row)
        parts += [row, keys[row].view(np.int64), lengths[requests[row]] + position, stayed]
    parts += carried
    there = uploaded(np.concatenate(parts), device).split([len(part) for part in parts])
    positions = [_Position(row, *there[4 * i : 4 * i + 4]) for i, row in enumerate(rows)]
    return positions, list(there[4 * len(rows) :])


def _laid_out_alike(
    rows: Sequence[np.ndarray],
    keys: np.ndarray,
    lengths: np.ndarray,
    requests: np.ndarray,
    carried: Sequence[np.ndarray],
    device: torch.device,
) -> tuple[list[_Position], list[torch.Tensor]]:
    """`_laid_out` for rows that all have every position; one compiled call."""
    batch, depth = len(keys), len(rows)
    own = positions_alike(keys, lengths, requests, depth)
    there = uploaded(np.concatenate([own, *carried]) if carried else own, device)
    alike = True
    for part in carried:
        alike = alike and len(part) == batch
    if alike:
        row, key, *parts = there.view(-1, batch).unbind()  # takes a third of the time of `split`
    else:
        row, key, *parts = there.split([batch] * (2 + depth) + [len(part) for part in carried])
    positions = [_Position(own_rows, row, key, at, row) for own_rows, at in zip(rows, parts, strict=False)]
    return positions, parts[depth:]


@cached_njit(nogil=True)
def choose_among(probs, token_ids, keys, positions, stream):
    """`argmax p(x) / E(x)` of every row over a list of tokens.

    Args:
        probs: float32 `[rows, tokens]`.
        token_ids: int64 `[tokens]`, ids that the noise is computed for.
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


def _one_hot(indices: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """One-hot rows, float32 `[rows, tokens]`, shaped like `logits`."""
    hot = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    return hot.scatter_(1, indices[:, None], 1.0)
