"""Forecasts a draft before it is made, from the drafter's recent drafts in comparable situations."""

from __future__ import annotations

import numpy as np

from atlas_kernels.jit_cache import cached_njit

MAX_LOOKAHEAD = 16
# Situations differ by how likely the first token of the best draft so far is to survive: no draft, unlikely, ...
_EDGES = np.array([1e-9, 0.3, 0.6, 0.85])
_PROFILES = 32  # latest drafts kept per situation
_PERSISTENCE = 0.5  # share of a position's deviation from the usual acceptance that carries over to the next position
_USUAL_MEMORY = 200.0  # positions that the usual acceptance is averaged over
_OPTIMISM = 0.7  # acceptance assumed of an unknown drafter: enough to try it wherever drafting could pay
_OPTIMISTIC = _OPTIMISM ** np.arange(1, MAX_LOOKAHEAD + 1)


class DraftForecast:
    """Recent survival profiles of a drafter, keyed by how promising the best other draft was at that moment.

    A profile is the survival probability at each position of one draft. Whole profiles are kept, not their mean: a long
    draft pays if the drafter is sure about one request in ten, but not if it is slightly sure about all.
    """

    def __init__(self) -> None:
        self._profiles = np.zeros((len(_EDGES) + 1, _PROFILES, MAX_LOOKAHEAD))
        self._counts = np.zeros(len(_EDGES) + 1, np.int64)
        self._turn = 0  # of `predict`
        self._measured: np.ndarray | None = None
        self._usual = _OPTIMISM  # mean acceptance of a position whose prefix was accepted
        self._stood = 0.0  # weight of that mean: sum of the prefixes' survival

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs of `remembered` as flat tables; do not write to them."""
        return self._profiles, self._counts, _OPTIMISTIC if self._measured is None else self._measured

    def predict(self, beside: np.ndarray) -> np.ndarray:
        """Survival profiles expected of the next draft; `remembered` is the compiled form.

        Args:
            beside: float64 `[batch]`, survival of the first token of the best draft that each request has; 0 for none.

        Returns:
            float64 `[draws, batch, MAX_LOOKAHEAD]`, with enough draws to show every kept profile.
        """
        profiles, counts, unknown = self.tables()
        self._turn += 1  # if a situation has fewer requests than profiles, the next call shows other profiles
        turn = self._turn
        draws = -(-_PROFILES // len(beside))
        if not counts.any():
            return np.tile(unknown, (draws, len(beside), 1))
        known = np.flatnonzero(counts)
        situation = np.tile(np.searchsorted(_EDGES, beside, side="right"), draws)
        taken = np.zeros_like(situation)  # profiles used before by requests in the same situation
        for own in set(situation.tolist()):
            taken[situation == own] = np.arange((situation == own).sum())
        nearest = known[np.abs(known[None] - situation[:, None]).argmin(axis=1)]
        chosen = profiles[nearest, (turn + taken) % np.minimum(counts[nearest], _PROFILES)]
        return chosen.reshape(draws, len(beside), MAX_LOOKAHEAD)

    def observe(self, beside: np.ndarray, survival: np.ndarray, asked: np.ndarray, lengths: np.ndarray) -> None:
        """Remember the drafts of a step.

        Args:
            beside: As for `predict`, at the moment when the drafts were asked for.
            survival: float64 `[batch, MAX_LOOKAHEAD]`, their survival by position.
            asked: int64 `[batch]`, the most tokens wanted; rows with 0 are ignored.
            lengths: int64 `[batch]`, tokens drafted. A draft shorter than wanted ends there; one as long as wanted is
                extrapolated.
        """
        rows = np.flatnonzero(asked > 0)
        reached = lengths[rows] >= np.minimum(asked[rows], MAX_LOOKAHEAD)
        profiles = _prolonged(survival[rows], lengths[rows], reached, self._learn_usual(survival[rows]))
        group = np.searchsorted(_EDGES, beside[rows], side="right")
        for index in set(group.tolist()):
            new = profiles[group == index][-_PROFILES:]
            slots = (self._counts[index] + np.arange(len(new))) % _PROFILES
            self._profiles[index, slots] = new
            self._counts[index] += len(new)

    def _learn_usual(self, survival: np.ndarray) -> float:
        """Update the mean acceptance after an accepted position with these drafts (`[n, MAX_LOOKAHEAD]`)."""
        stood = float(survival[:, :-1][survival[:, 1:] > 0].sum())
        if stood:
            self._stood = min(self._stood, _USUAL_MEMORY) + stood
            self._usual += (float(survival[:, 1:].sum()) / stood - self._usual) * stood / self._stood
        return self._usual

    def policy_updated(self, measured: np.ndarray | None) -> None:
        """The drafter was refreshed.

        Args:
            measured: float64 `[n]`, its mean survival by position on the newest rollouts; None if it was not measured.
                The kept profiles are scaled by the change since the last measurement.
        """
        if measured is None:
            return
        lengths = np.array([min(len(measured), MAX_LOOKAHEAD)])
        padded = np.pad(measured[:MAX_LOOKAHEAD], (0, MAX_LOOKAHEAD - lengths[0]))
        new = _prolonged(padded[None], lengths, np.array([True]), self._usual)[0]
        if self._measured is not None:
            factor = new / np.maximum(self._measured, 1e-3)
            # The factors differ by position, but survival must not rise along a profile.
            self._profiles = np.minimum.accumulate(np.clip(self._profiles * factor, 0.0, 1.0), axis=-1)
        self._measured = new


@cached_njit(nogil=True)
def remembered(
    beside: np.ndarray, profiles: np.ndarray, counts: np.ndarray, turn: int, unknown: np.ndarray
) -> np.ndarray:
    """Profiles of the nearest known situation for each request, in rotation; `unknown` if no situation is known.

    Args:
        beside: As for `DraftForecast.predict`, the plain form of this function.
        profiles: `DraftForecast.tables()`, like `counts` and `unknown`.
        counts: int64 `[situations]`.
        turn: Offset into the rotation of profiles: the number of forecasts, so that each shows other profiles.
        unknown: float64 `[MAX_LOOKAHEAD]`.

    Returns:
        float64 `[draws, batch, MAX_LOOKAHEAD]`.
    """
    batch, lookahead = len(beside), profiles.shape[2]
    draws = -(-profiles.shape[1] // batch)
    survival = np.empty((draws, batch, lookahead))
    nearest = np.full(len(counts), -1)
    for own in range(len(counts)):
        for index in range(len(counts)):
            if counts[index] > 0 and (nearest[own] < 0 or abs(index - own) < abs(nearest[own] - own)):
                nearest[own] = index
    given = np.zeros(len(counts), np.int64)  # profiles used so far, per situation
    for draw in range(draws):
        for row in range(batch):
            own = np.searchsorted(_EDGES, beside[row], side="right")
            if nearest[own] < 0:
                survival[draw, row] = unknown
            else:
                count = min(counts[nearest[own]], profiles.shape[1])
                survival[draw, row] = profiles[nearest[own], (turn + given[own]) % count]
            given[own] += 1
    return survival


def _prolonged(survival: np.ndarray, lengths: np.ndarray, goes_on: np.ndarray, usual: float) -> np.ndarray:
    """Extend profiles beyond the draft, from the acceptance of its last position towards the usual acceptance."""
    profiles, last = survival.copy(), np.maximum(lengths - 1, 0)
    rows = np.arange(len(survival))
    ends = survival[rows, last]
    before = np.where(last > 0, survival[rows, np.maximum(last - 1, 0)], 1.0)
    beyond = np.arange(survival.shape[1])[None] - last[:, None]
    surprise = (ends / np.maximum(before, 1e-9) - usual)[:, None] * _PERSISTENCE ** np.maximum(beyond, 0)
    acceptance = np.where((goes_on & (lengths > 0))[:, None], usual + surprise, 0.0)
    onward = np.cumprod(np.where(beyond > 0, acceptance, 1.0), axis=1)
    return np.where(beyond > 0, ends[:, None] * onward, profiles)
