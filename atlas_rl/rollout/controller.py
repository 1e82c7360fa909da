"""The controller: which speculator drafts how many tokens for each request, so that tokens per second are most.

Expected goodput of a step is expected committed tokens over time:

    G = (batch + sum of survival probabilities of the admitted draft slots) / (draft time + forward time(batch + slots))

A slot's survival probability is the product of the calibrated acceptance probabilities up to it. Slots are ranked over
the whole batch and the best n are admitted, with n where G peaks; n = 0 is an answer. Acceptance (`acceptance.py`) and
cost (`cost.py`) are learned in the run. Pure logic over numpy arrays: no tensors, and no clock but the times it is told.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from atlas_rl.rollout.acceptance import AcceptanceModel
from atlas_rl.rollout.cost import CostModel
from atlas_rl.speculators.base import Draft, Verified

_MAX_LOOKAHEAD = 16
_CHEAP = 0.03  # a speculator that proposes within this share of a forward is asked on every step
_RECENT = 9  # draft times whose median counts: one call that compiled or was interrupted does not
_TRIALS = 3  # steps that a costly speculator gets before it is judged
_RETRY_STEPS = 64  # idle steps after which a costly speculator that lost gets another trial, doubling with each loss
_KEPT_STEPS = 20.0  # about the last twenty steps tell how much of the predicted goodput is kept
_KEPT_PRIOR_STEPS, _KEPT_PRIOR_SPREAD = 3.0, 0.1  # before any evidence, as if three steps had missed by a tenth
_DOUBT_FADES = 0.01  # per plain step: a hundred of them forget most of what spoke against drafting
_PLAIN_EVERY = 100  # steps after which a step without drafts measures anew what no speculation costs


@dataclass(slots=True)
class Admission:
    """What is verified in one step.

    Attributes:
        arms: int64 `[batch]`, index of the speculator whose draft is used; meaningless where the length is 0.
        lengths: int64 `[batch]`, admitted draft tokens.
    """

    arms: np.ndarray
    lengths: np.ndarray


class Controller(ABC):
    """Plans every decode step. The same object serves the whole run and learns from it."""

    speculators: tuple[str, ...]
    """Names of the engine's speculators, in the order that `Admission.arms` refers to."""

    @abstractmethod
    def plan(self, batch: int, room: np.ndarray) -> dict[str, np.ndarray]:
        """Most draft tokens to ask of each speculator.

        Args:
            batch: Active requests.
            room: int64 `[batch]`, most draft tokens each request can still use.

        Returns:
            Speculator name to int64 `[batch]`; speculators that are not asked are absent.
        """

    @abstractmethod
    def admit(self, drafts: Mapping[str, Draft], batch: int) -> Admission:
        """Pick, per request, the draft to use and how much of it. Uses confidences only, never the drafted tokens.

        Args:
            drafts: Of the speculators that were asked and ready.
            batch: Active requests.
        """

    @abstractmethod
    def observe(
        self,
        drafts: Mapping[str, Draft],
        admission: Admission,
        verified: Verified,
        draft_s: Mapping[str, float],
        forward_s: float,
        step_s: float,
    ) -> None:
        """Learn from a step: what was drafted, admitted and committed, and the seconds it took.

        Args:
            drafts: What was proposed.
            admission: What of it was verified.
            verified: What was committed.
            draft_s: Seconds of each speculator's proposal.
            forward_s: Seconds of the target forward.
            step_s: Seconds of the whole step so far: planning, proposals, forward, sampling and commit.
        """

    @abstractmethod
    def policy_updated(self) -> None:
        """The policy moved on."""

    @abstractmethod
    def plain_forward_s(self, batch: int) -> float | None:
        """Estimated seconds of a forward that decodes one token for each of `batch` requests; None if unknown."""


@dataclass(slots=True)
class _Kept:
    """Log of realised over predicted goodput of one kind of step: mean and variance over the recent ones."""

    mean: float = 0.0
    variance: float = _KEPT_PRIOR_SPREAD**2
    num_steps: float = _KEPT_PRIOR_STEPS

    def observe(self, surprise: float) -> None:
        self.num_steps = min(self.num_steps + 1, _KEPT_STEPS)
        deviation = surprise - self.mean
        self.mean += deviation / self.num_steps
        self.variance += (deviation**2 - self.variance) / self.num_steps


@dataclass(slots=True)
class _Arm:
    """What is known of one speculator."""

    acceptance: AcceptanceModel = field(default_factory=AcceptanceModel)
    calls_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))  # seconds of calls to propose
    depths_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))  # the same, per draft position
    survival: np.ndarray = field(default_factory=lambda: np.full(_MAX_LOOKAHEAD, np.nan))
    trials: int = 0
    losses: int = 0
    idle_steps: int = 0


class GoodputController(Controller):
    """Goodput maximisation as in the module's docstring, for any number of speculators.

    Speculators that cost next to nothing are asked on every step, and each request uses the most promising draft. A
    costly speculator is asked while its expected goodput beats that of the others, and gets a rare trial otherwise.

    Args:
        speculators: Names, in the order that `Admission.arms` refers to.
    """

    def __init__(self, speculators: Sequence[str]) -> None:
        self.speculators = self._names = tuple(speculators)
        self._arms = {name: _Arm() for name in self._names}
        self._cost = CostModel()
        self._lookahead = 4
        self._without_gain: float | None = None  # goodput over that of a plain step, of steps without any costly arm
        self._steps_since_plain = _PLAIN_EVERY  # the first step of a run is plain
        self._predicted: float | None = None  # goodput that the last decision expected
        self._kept = {True: _Kept(), False: _Kept()}  # of steps with drafts, and of plain ones

    def plan(self, batch: int, room: np.ndarray) -> dict[str, np.ndarray]:
        if not self._names or self._steps_since_plain >= _PLAIN_EVERY:
            return {}
        return {
            name: np.minimum(room, lookahead) for name in self._names if (lookahead := self._wanted(name, batch)) > 0
        }

    def admit(self, drafts: Mapping[str, Draft], batch: int) -> Admission:
        arms, lengths = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        width = max((draft.confidence.shape[1] for draft in drafts.values()), default=0)
        plain_s = self.plain_forward_s(batch)
        self._predicted = batch / plain_s if plain_s else None
        if width == 0:
            return Admission(arms, lengths)
        # Draws that rejection verifies: whether a token is verified must not depend on the token. A later position's
        # confidence is computed from it, so a row's arm is chosen by first positions, and slots are admitted one by one.
        drawn = any(draft.draft_probs is not None for draft in drafts.values())
        survival = np.zeros((batch, width))
        expected = np.zeros(batch)
        for name, draft in drafts.items():
            own = self._survival(name, draft)
            gain = (own[:, :1] if drawn else own).sum(axis=1)
            better = gain > expected
            survival[better] = 0
            survival[better, : own.shape[1]] = own[better]
            expected[better] = gain[better]
            arms[better] = self._names.index(name)
        lengths = self._best_lengths(survival, batch, one_by_one=drawn)
        return Admission(arms, lengths)

    def observe(
        self,
        drafts: Mapping[str, Draft],
        admission: Admission,
        verified: Verified,
        draft_s: Mapping[str, float],
        forward_s: float,
        step_s: float,
    ) -> None:
        batch = len(verified.requests)
        slots = int(admission.lengths.sum())
        self._steps_since_plain = self._steps_since_plain + 1 if slots else 0
        self._cost.observe(batch + slots, forward_s)
        costly = [name for name in drafts if not self._cheap(name, forward_s)]
        # Whether a costly draft was worth its time is for `_wanted`; here only what was promised after it was there.
        admitted_s = step_s - sum(draft_s[name] for name in costly)
        self._compare(slots > 0, float(verified.num_committed.sum()) / admitted_s, bool(drafts))
        self._lookahead = int(np.clip(max(self._lookahead - 1, admission.lengths.max() + 2), 4, _MAX_LOOKAHEAD))
        for name, draft in drafts.items():
            self._learn(name, draft, admission, verified, draft_s[name])
        for name, arm in self._arms.items():
            arm.idle_steps = 0 if name in drafts else arm.idle_steps + 1
        for name in costly:
            self._arms[name].trials += 1
        plain_s = self.plain_forward_s(batch)
        if not costly and plain_s is not None:
            gain = float(verified.num_committed.mean()) * plain_s / (forward_s + sum(draft_s.values()))
            self._without_gain = _blend(self._without_gain, gain)

    def policy_updated(self) -> None:
        for arm in self._arms.values():
            arm.acceptance.policy_updated()
            arm.losses = 0
            arm.trials = min(arm.trials, _TRIALS - 1)  # its refresh may have made a loser good: one step shows

    def plain_forward_s(self, batch: int) -> float | None:
        table = self._cost.predict(batch)
        return None if table is None else float(table[batch])

    def _compare(self, drafted: bool, goodput: float, had_choice: bool) -> None:
        """Note how much of its predicted goodput a step kept."""
        if self._predicted is not None:
            self._kept[drafted].observe(float(np.clip(np.log(goodput / self._predicted), -1.0, 1.0)))
        if had_choice and not drafted:
            # Nothing is learned about drafting while nothing is drafted: doubt fades, and drafting is tried again.
            self._kept[True].mean += _DOUBT_FADES * (self._kept[False].mean - self._kept[True].mean)

    def _discount(self) -> float:
        """Factor on the predicted goodput of drafting: what drafting steps have kept of it, against what plain steps have.

        What the two models do not see (sampling rounds, bookkeeping, a ragged batch, optimism where n was chosen because
        it looked best) is in there, and only there. The standard error is taken off as well: a gain that this machine's
        step times cannot tell from noise is not worth the risk of a loss.
        """
        drafted, plain = self._kept[True], self._kept[False]
        # Noise of step times is the machine's, whatever the step: one variance, so that plain steps tell it as well.
        num_steps = drafted.num_steps + plain.num_steps
        variance = (drafted.variance * drafted.num_steps + plain.variance * plain.num_steps) / num_steps
        error = np.sqrt(variance / drafted.num_steps + variance / plain.num_steps)
        return float(np.exp(min(0.0, drafted.mean - plain.mean) - error))

    def _learn(self, name: str, draft: Draft, admission: Admission, verified: Verified, seconds: float) -> None:
        arm = self._arms[name]
        used = (admission.arms == self._names.index(name)) & (admission.lengths > 0)
        arm.acceptance.observe(draft.confidence[used], verified.num_drafted[used], verified.num_accepted[used])
        depth = int(draft.lengths.max(initial=0))
        arm.calls_s.append(seconds)
        if depth:
            arm.depths_s.append(seconds / depth)
        expected = self._survival(name, draft).mean(axis=0)
        for position, value in enumerate(expected[:_MAX_LOOKAHEAD]):
            known = arm.survival[position]
            arm.survival[position] = value if np.isnan(known) else known + 0.2 * (value - known)

    def _survival(self, name: str, draft: Draft) -> np.ndarray:
        """Survival probability of every slot: float64 `[batch, draft_len]`, zero past a row's length."""
        estimate = self._arms[name].acceptance.estimate(draft.confidence)
        present = np.arange(draft.confidence.shape[1])[None] < draft.lengths[:, None]
        return np.cumprod(np.where(present, estimate, 0.0), axis=1)

    def _best_lengths(self, survival: np.ndarray, batch: int, *, one_by_one: bool) -> np.ndarray:
        """Admit the n likeliest slots of the batch, n where goodput peaks: int64 `[batch]`.

        Args:
            survival: float64 `[batch, draft_len]`.
            batch: Active requests.
            one_by_one: Take n where goodput first fails to rise. Slots come in falling order of survival, so whether one
                is admitted then depends on likelier slots alone, never on a later one of its own row.
        """
        rows, positions = np.nonzero(survival > 0)
        values = survival[rows, positions]
        order = np.lexsort((positions, -values))  # a row's slots stay in order: survival never rises along a row
        seconds = self._cost.predict(batch + len(values))
        if seconds is None:
            return np.zeros(batch, np.int64)
        tokens = batch + np.concatenate([[0.0], np.cumsum(values[order])])
        seconds = seconds[batch : batch + len(values) + 1]
        if one_by_one:
            # The discount goes on what each slot brings: on the sum it would let later slots decide about earlier ones.
            goodput = (batch + self._discount() * (tokens - batch)) / seconds
            stops = np.flatnonzero(np.diff(goodput) <= 0)
            best = int(stops[0]) if len(stops) else len(values)
        else:
            goodput = tokens / seconds
            goodput[1:] *= self._discount()
            best = int(np.argmax(goodput))
        self._predicted = float(tokens[best] / seconds[best])
        admitted = order[:best]
        return np.bincount(rows[admitted], minlength=batch).astype(np.int64)

    def _cheap(self, name: str, forward_s: float) -> bool:
        calls_s = self._arms[name].calls_s
        return len(calls_s) > 0 and median(calls_s) <= _CHEAP * forward_s

    def _wanted(self, name: str, batch: int) -> int:
        """Draft tokens to ask of one speculator now; 0 not to ask."""
        arm, seconds = self._arms[name], self._cost.predict(batch * (_MAX_LOOKAHEAD + 1))
        if seconds is None:
            return 0
        if self._cheap(name, float(seconds[batch])):
            return self._lookahead
        if not arm.depths_s or arm.trials < _TRIALS:
            return self._lookahead
        best, goodput = self._best_depth(arm, batch, seconds)
        rival = max(self._without_gain or 0.0, 1.0) * batch / float(seconds[batch])
        # Steps without it may be too few to tell what the cheap ones achieve alone: expect it of them likewise.
        cheap = (self._arms[n] for n in self._names if n != name and self._cheap(n, float(seconds[batch])))
        rival = max(rival, *(self._best_depth(other, batch, seconds)[1] for other in cheap if other.depths_s), 0.0)
        if goodput > rival:
            return best
        if arm.idle_steps > _RETRY_STEPS << min(arm.losses, 6):
            arm.losses += 1
            return max(best, 1)
        return 0

    def _best_depth(self, arm: _Arm, batch: int, seconds: np.ndarray) -> tuple[int, float]:
        """Depth with the most expected goodput when every request drafts alike, and that goodput, discounted."""
        known = int(np.count_nonzero(~np.isnan(arm.survival)))
        depth = np.arange(1, known + 1)
        tokens = batch * (1 + np.cumsum(arm.survival[:known]))
        goodput = tokens / (seconds[batch * (depth + 1)] + depth * median(arm.depths_s))
        if known == 0:
            return 0, 0.0
        best = int(np.argmax(goodput))
        return int(depth[best]), float(goodput[best]) * self._discount()


class FixedController(Controller):
    """One speculator, always the same number of draft tokens: an arm of a comparison, not a policy for a run.

    Args:
        speculators: Names, in the order that `Admission.arms` refers to.
        arm: The one that drafts.
        num_draft_tokens: Draft tokens per request and step, as far as the speculator has them.
    """

    def __init__(self, speculators: Sequence[str], arm: str, num_draft_tokens: int) -> None:
        if arm not in speculators:
            raise ValueError(f"no speculator '{arm}' among {list(speculators)}")
        if num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens must be at least 1, got {num_draft_tokens}: 0 is speculation=False")
        self.speculators = tuple(speculators)
        self._arm = arm
        self._index = list(speculators).index(arm)
        self._num_draft_tokens = num_draft_tokens
        self._cost = CostModel()

    def plan(self, batch: int, room: np.ndarray) -> dict[str, np.ndarray]:
        return {self._arm: np.minimum(room, self._num_draft_tokens)}

    def admit(self, drafts: Mapping[str, Draft], batch: int) -> Admission:
        drafted = drafts.get(self._arm, Draft.empty(batch))  # a drafter that is not ready was not asked
        return Admission(np.full(batch, self._index), drafted.lengths.copy())

    def observe(
        self,
        drafts: Mapping[str, Draft],
        admission: Admission,
        verified: Verified,
        draft_s: Mapping[str, float],
        forward_s: float,
        step_s: float,
    ) -> None:
        self._cost.observe(len(verified.requests) + int(admission.lengths.sum()), forward_s)

    def policy_updated(self) -> None:
        """Nothing to do: it learns nothing about speculators."""

    def plain_forward_s(self, batch: int) -> float | None:
        table = self._cost.predict(batch)
        return None if table is None else float(table[batch])


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + 0.1 * (new - old)
