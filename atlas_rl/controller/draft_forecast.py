"""What to expect of a speculator's draft before it is made: what it lately drafted where the others had as much to say."""

from __future__ import annotations

import numba
import numpy as np

MAX_LOOKAHEAD = 16
_EDGES = np.array(
    [1e-9, 0.3, 0.6, 0.85]
)  # survival of the first draft token that is there already: none, unlikely, ...
_PROFILES = 32  # latest drafts kept per class
_PERSISTENCE = 0.5  # of a position's easiness, from one to the next
_USUAL_MEMORY = 200.0  # positions that the usual acceptance is a mean over
_OPTIMISM = 0.7  # acceptance of a speculator that nothing is known of: enough to be tried where drafting pays at all
_OPTIMISTIC = _OPTIMISM ** np.arange(1, MAX_LOOKAHEAD + 1)


class Expectation:
    """Latest survival profiles of a speculator's drafts, by how promising the draft was that others had made there.

    A profile is the survival probability at each draft position of one draft. Whole profiles and not their means are kept: a
    speculator that is sure of one request in ten is worth asking for a long draft, one that is a little sure of all is not.
    """

    def __init__(self) -> None:
        self._profiles = np.zeros((len(_EDGES) + 1, _PROFILES, MAX_LOOKAHEAD))
        self._counts = np.zeros(len(_EDGES) + 1, np.int64)
        self._turn = 0
        self._measured: np.ndarray | None = None
        self._usual = _OPTIMISM  # acceptance of a position behind one that stood
        self._stood = 0.0  # survival that this is the mean over

    def survival(self, there: np.ndarray) -> np.ndarray:
        """Profiles to expect, in as many draws as show all that is remembered: float64 `[draws, batch, MAX_LOOKAHEAD]`.

        Args:
            there: float64 `[batch]`, survival of the first token of the best draft that each request has; 0 for none.
        """
        draws = -(-_PROFILES // len(there))
        group = np.searchsorted(_EDGES, there, side="right")
        self._turn += 1  # where a class has fewer requests than profiles, others the next time
        unknown = _OPTIMISTIC if self._measured is None else self._measured
        return _remembered(self._profiles, self._counts, group, draws, self._turn, unknown)

    def observe(self, there: np.ndarray, survival: np.ndarray, asked: np.ndarray, lengths: np.ndarray) -> None:
        """Note drafts.

        Args:
            there: As for `survival`, when they were asked for.
            survival: float64 `[batch, MAX_LOOKAHEAD]`.
            asked: int64 `[batch]`, most tokens wanted; rows with 0 say nothing.
            lengths: int64 `[batch]`, tokens drafted. A draft that ends before what was wanted has nothing beyond; one that
                is as long is taken to go on as it went.
        """
        rows = np.flatnonzero(asked > 0)
        reached = lengths[rows] >= np.minimum(asked[rows], MAX_LOOKAHEAD)
        profiles = _prolonged(survival[rows], lengths[rows], reached, self._learn_usual(survival[rows]))
        group = np.searchsorted(_EDGES, there[rows], side="right")
        for index in set(group.tolist()):
            new = profiles[group == index][-_PROFILES:]
            slots = (self._counts[index] + np.arange(len(new))) % _PROFILES
            self._profiles[index, slots] = new
            self._counts[index] += len(new)

    def _learn_usual(self, survival: np.ndarray) -> float:
        """The acceptance of drafted positions, given what stands before them, with these drafts (`[n, MAX_LOOKAHEAD]`)."""
        stood = float(survival[:, :-1][survival[:, 1:] > 0].sum())
        if stood:
            self._stood = min(self._stood, _USUAL_MEMORY) + stood
            self._usual += (float(survival[:, 1:].sum()) / stood - self._usual) * stood / self._stood
        return self._usual

    def policy_updated(self, measured: np.ndarray | None) -> None:
        """The speculator was refreshed.

        Args:
            measured: float64 `[n]`, mean survival by position as measured on the newest rollouts, where it was. Profiles
                change in proportion to it.
        """
        if measured is None:
            return
        lengths = np.array([min(len(measured), MAX_LOOKAHEAD)])
        padded = np.pad(measured[:MAX_LOOKAHEAD], (0, MAX_LOOKAHEAD - lengths[0]))
        new = _prolonged(padded[None], lengths, np.array([True]), self._usual)[0]
        if self._measured is not None:
            factor = new / np.maximum(self._measured, 1e-3)
            # Survival never rises along a profile, whatever the factors.
            self._profiles = np.minimum.accumulate(np.clip(self._profiles * factor, 0.0, 1.0), axis=-1)
        self._measured = new


@numba.njit(cache=True, nogil=True)
def _remembered(
    profiles: np.ndarray, counts: np.ndarray, group: np.ndarray, draws: int, turn: int, unknown: np.ndarray
) -> np.ndarray:
    """Profiles of the known class that is nearest to each request's, one after the other; `unknown` where none is.

    Compiled, because it is wanted up to three times a step, and in numpy took a sixth of a decision.
    """
    batch, lookahead = len(group), profiles.shape[2]
    survival = np.empty((draws, batch, lookahead))
    given = np.zeros(len(counts), np.int64)  # profiles so far, per class of requests
    for draw in range(draws):
        for row in range(batch):
            own, nearest = group[row], -1
            for index in range(len(counts)):
                if counts[index] > 0 and (nearest < 0 or abs(index - own) < abs(nearest - own)):
                    nearest = index
            if nearest < 0:
                survival[draw, row] = unknown
            else:
                count = min(counts[nearest], profiles.shape[1])
                survival[draw, row] = profiles[nearest, (turn + given[own]) % count]
            given[own] += 1
    return survival


def _prolonged(survival: np.ndarray, lengths: np.ndarray, goes_on: np.ndarray, usual: float) -> np.ndarray:
    """Profiles that go on beyond the draft: at the acceptance of its last position first, at the usual one in the end."""
    profiles, last = survival.copy(), np.maximum(lengths - 1, 0)
    rows = np.arange(len(survival))
    ends = survival[rows, last]
    before = np.where(last > 0, survival[rows, np.maximum(last - 1, 0)], 1.0)
    beyond = np.arange(survival.shape[1])[None] - last[:, None]
    surprise = (ends / np.maximum(before, 1e-9) - usual)[:, None] * _PERSISTENCE ** np.maximum(beyond, 0)
    acceptance = np.where((goes_on & (lengths > 0))[:, None], usual + surprise, 0.0)
    onward = np.cumprod(np.where(beyond > 0, acceptance, 1.0), axis=1)
    return np.where(beyond > 0, ends[:, None] * onward, profiles)
