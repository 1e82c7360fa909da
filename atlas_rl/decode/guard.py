"""Catches errors of drafters and controllers: they cost drafts, never the generation.

Whatever is drafted, the tokens are the policy's. So a drafter that raises, or returns an invalid draft, must not cost
the rollouts of a step or the requests of a server. It is turned off until the next policy update; its error is logged
with its traceback, and named and counted in the report; everything goes on without it. If the controller fails, nothing
is drafted.

The library catches `Exception` only here, around code that users plug in and that decides nothing but speed. Errors of
the policy's own forward, interrupts and exits are not caught.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from atlas_rl.controller.base import Admission, Controller, Step
from atlas_rl.core import Draft, Prompts, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.decode.checked import (
    check_draft,
    checked_admission,
    checked_backlog,
    checked_plan,
    checked_plan_ahead,
    checked_survival,
)
from atlas_rl.policy.captures import Captured
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.speculators.base import NO_PROMPTS, Coming, Speculator
from atlas_rl.speculators.saved_state import NOT_SAVED

if TYPE_CHECKING:
    from atlas_rl.policy.base import PolicyCache
    from atlas_rl.policy.view import PolicyView

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
_KEPT_MESSAGES = 100  # between two reports; further errors are only counted
_LONGEST_TEXT = 200
FOLLOWING = "drafting"
"""Name under which errors in following an engine's requests are counted. New requests are followed again at once."""
_IN_IDLE_TIME = ("study", "end_study")
"""Methods that nobody waits for. Errors there leave a drafter on: engines without policy updates would lose it for good."""


class Faults:
    """Errors caught since the last report."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._messages: dict[str, None] = {}
        self._logged: set[tuple[str, str, str]] = set()

    def attempt(
        self, name: str, where: str, call: Callable[..., Value], otherwise: Value, *arguments: Any
    ) -> tuple[Value, bool]:
        """Return `call(*arguments)` and True, or `otherwise` and False if it raises.

        Args:
            name: Name of the drafter or controller.
            where: Name of the method.
            call: Function that may raise.
            otherwise: Result if it raises.
            arguments: Arguments of `call`.
        """
        try:
            return call(*arguments), True
        except Exception as error:  # noqa: BLE001 - an error in drafting must not end a generation
            self.note(name, where, error)
            return otherwise, False

    def report_to(self, recorder: StepRecorder) -> None:
        """Hand over the caught errors to a recorder, once."""
        recorder.faults(self._counts, self._messages)
        self._counts, self._messages = {}, {}

    def note(self, name: str, where: str, error: Exception) -> None:
        """Count an error that was caught, and log it once."""
        kind = type(error).__name__
        text = " ".join(str(error).split())[:_LONGEST_TEXT]
        self._counts[name] = self._counts.get(name, 0) + 1
        if len(self._messages) < _KEPT_MESSAGES:
            self._messages[
                f"drafting: {where}() raised {kind}: {text}; running requests get no more drafts"
                if name == FOLLOWING
                else f"{name}: {where}() raised {kind}: {text}; it drafts on, and its learning in idle time has ended"
                if where in _IN_IDLE_TIME
                else f"{name}: {where}() raised {kind}: {text}; it is off until the next policy update"
            ] = None
        if (name, where, kind) not in self._logged:
            self._logged.add((name, where, kind))
            logger.error("atlas_rl: %s: %s() raised; generation goes on without it", name, where, exc_info=error)


def _guarded(otherwise: Callable[..., Any]) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Decorates a method of a guard: it is not called while the guard is off, and an error in it turns the guard off.

    The one place that catches errors of methods: some run in every step, and a helper that is told what to call would
    cost them twice as many calls.

    Args:
        otherwise: Makes the result instead, of the method's arguments.
    """

    def decorate(method: Callable[..., Value]) -> Callable[..., Value]:
        where = method.__name__.removeprefix("_")

        @wraps(method)
        def guarded(guard: _Guard, *arguments: Any, **named: Any) -> Value:
            if not guard.is_off:
                try:
                    return method(guard, *arguments, **named)
                except Exception as error:  # noqa: BLE001 - an error in drafting must not end a generation
                    guard.faults.note(guard.counted_as, where, error)
                    guard.turn_off()
            result: Value = otherwise(*arguments, **named)
            return result

        return guarded

    return decorate


def _nothing(*arguments: Any, **named: Any) -> Any:
    """None, whatever the arguments."""


class _Guard:
    """What a guard has that `_guarded` asks for.

    Attributes:
        counted_as: Name under which errors are counted.
        faults: Receives them.
        is_off: Whether what it guards is called no more.
    """

    counted_as: str
    faults: Faults
    is_off = False

    def turn_off(self) -> None:
        """Call what it guards no more."""
        self.is_off = True


class GuardedSpeculator(_Guard, Speculator):
    """Wraps a speculator and catches its errors; other attributes are passed through.

    Args:
        speculator: Speculator to guard.
        faults: Receives the caught errors.

    Attributes:
        unguarded: The wrapped speculator.
    """

    def __init__(self, speculator: Speculator, faults: Faults) -> None:
        self.unguarded, self.faults = speculator, faults
        self.name, self.needs, self.observes_late = speculator.name, speculator.needs, speculator.observes_late
        self.counted_as = self.name
        self._policy: PolicyView | None = None
        self._version = -1  # of the policy at the latest call
        self._failed_at = -1  # likewise, at the latest error
        self._ends_study = False  # after an error in `study`, until `end_study`

    def __getattr__(self, name: str) -> Any:
        if name == "unguarded":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.unguarded, name)

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Bind the speculator. Errors are raised, not caught: the caller chose this speculator."""
        self.unguarded.bind(policy, couples_noise)
        self._policy = policy
        self.needs, self.is_off = self.unguarded.needs, False

    @_guarded(_nothing)
    def compile_for(self, sampling: SamplingParams) -> None:
        self.unguarded.compile_for(sampling)

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        self._version = sequences.policy_version
        self._start(sequences, requests, prompts, cache)

    @_guarded(_nothing)
    def _start(self, sequences: Sequences, requests: np.ndarray, prompts: Prompts, cache: PolicyCache | None) -> None:
        self.unguarded.start(sequences, requests, prompts, cache)

    @_guarded(_nothing)
    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        backlog = self.unguarded.backlog(sequences, requests)
        return backlog if type(backlog) is int and backlog >= 0 else checked_backlog(backlog)

    @_guarded(lambda sequences, requests, max_draft_tokens: Draft.empty(len(requests)))
    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        draft = self.unguarded.propose(sequences, requests, max_draft_tokens)
        check_draft(draft, max_draft_tokens, sequences.vocab_size)
        if draft.draft_probs is not None and self._policy is not None:
            draft.draft_probs = draft.draft_probs.to(self._policy.device)  # the drafter may work on another device
        return draft

    @_guarded(lambda sampling: False)
    def drafts_ahead(self, sampling: SamplingParams) -> bool:
        return self.unguarded.drafts_ahead(sampling)

    @_guarded(lambda sequences, coming, num_tokens: partial(Draft.empty, len(coming.requests)))
    def propose_ahead(self, sequences: Sequences, coming: Coming, num_tokens: int) -> Callable[[], Draft]:
        most = np.full(len(coming.requests), num_tokens)
        return partial(self._fetch_ahead, self.unguarded.propose_ahead(sequences, coming, num_tokens), most, sequences)

    @property
    @_guarded(lambda: 0.0)
    def once_s(self) -> float:
        return self.unguarded.once_s

    @_guarded(lambda fetch, most, sequences: Draft.empty(len(most)))
    def _fetch_ahead(self, fetch: Callable[[], Draft], most: np.ndarray, sequences: Sequences) -> Draft:
        draft = fetch()
        check_draft(draft, most, sequences.vocab_size)
        return draft

    @_guarded(_nothing)
    def observe(self, sequences: Sequences, verified: Verified) -> None:
        self.unguarded.observe(sequences, verified)

    @_guarded(_nothing)
    def learn(self) -> None:
        self.unguarded.learn()

    def study(self) -> bool:
        """An error ends learning until `end_study`; it turns the drafter off only if a weight is not finite any more."""
        if self.is_off or self._ends_study:
            return False
        more, went_well = self.faults.attempt(self.counted_as, "study", self.unguarded.study, False)
        if not went_well:
            self._ends_study = True
            self._end_lesson()
            self._check_weights()
        return more

    def end_study(self) -> None:
        self._ends_study = False
        if not (self.is_off or self._end_lesson()):
            self._check_weights()

    def _end_lesson(self) -> bool:
        """Whether a lesson could be ended."""
        return self.faults.attempt(self.counted_as, "end_study", self.unguarded.end_study, None)[1]

    @_guarded(_nothing)
    def _check_weights(self) -> None:
        if not all(bool(torch.isfinite(weight).all()) for weight in self.unguarded.weights()):
            raise ArithmeticError("a weight is not finite")

    @_guarded(_nothing)
    def release(self) -> None:
        self.unguarded.release()

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        self.is_off = self.is_off and policy_version == self._failed_at
        self._version = policy_version
        return self._refresh(rollouts, policy_version)

    @_guarded(_nothing)
    def _refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        return checked_survival(self.unguarded.refresh(rollouts, policy_version))

    @_guarded(_nothing)
    def shared(self) -> torch.Tensor | None:
        return self.unguarded.shared()

    @_guarded(_nothing)
    def take_shared(self, total: torch.Tensor) -> None:
        self.unguarded.take_shared(total)

    @_guarded(Captured)
    def take_captured(self) -> Captured:
        return self.unguarded.take_captured()

    @_guarded(tuple)
    def weights(self) -> Iterable[torch.Tensor]:
        return tuple(self.unguarded.weights())

    def state_dict(self) -> dict[str, Any]:
        """State of the speculator, of one that is off as well: an error in drafting must not cost what it has learned."""
        was_off, self.is_off = self.is_off, False
        state = self._state_dict()
        self.is_off = self.is_off or was_off
        if state is NOT_SAVED:
            logger.warning("atlas_rl: nothing of the drafter '%s' is saved: its state_dict() raised", self.name)
        return state

    @_guarded(lambda: NOT_SAVED)
    def _state_dict(self) -> dict[str, Any]:
        return self.unguarded.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unguarded.load_state_dict(state)

    def turn_off(self) -> None:
        self.is_off, self._failed_at = True, self._version
        # An empty call ends the present one, whose state may be inconsistent after the error. It may raise as well.
        with suppress(Exception):
            try:
                self.unguarded.start(_empty_call(self._version), np.zeros(0, np.int64))
            finally:
                self.unguarded.release()


class GuardedController(_Guard, Controller):
    """Wraps a controller and catches its errors; after an error nothing is drafted.

    Args:
        controller: Controller to guard.
        faults: Receives the caught errors.
    """

    counted_as = "controller"

    def __init__(self, controller: Controller, faults: Faults) -> None:
        self.unguarded, self.speculators, self.faults = controller, controller.speculators, faults
        self.plans_ahead = controller.plans_ahead

    def __getattr__(self, name: str) -> Any:
        if name == "unguarded":
            raise AttributeError(name)
        return getattr(self.unguarded, name)

    @_guarded(lambda step: {})
    def plan(self, step: Step) -> dict[str, np.ndarray]:
        return checked_plan(self.unguarded.plan(step), step)

    @_guarded(lambda step, names: {})
    def plan_ahead(self, step: Step, names: Sequence[str]) -> dict[str, int]:
        return checked_plan_ahead(self.unguarded.plan_ahead(step, names), names)

    @_guarded(lambda step: Admission(np.zeros(step.batch, np.int64), np.zeros(step.batch, np.int64)))
    def admit(self, step: Step) -> Admission:
        return checked_admission(self.unguarded.admit(step), step, self.speculators)

    @_guarded(_nothing)
    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        return self.unguarded.observe(step, admission, verified, forward_s, step_s)

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        self.is_off = False
        self._policy_updated(expected)

    @_guarded(_nothing)
    def _policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        self.unguarded.policy_updated(expected)

    @_guarded(_nothing)
    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        return self.unguarded.plain_forward_s(batch, context_tokens)

    @_guarded(_nothing)
    def forwards_are_padded(self, sizes: Sequence[int]) -> None:
        self.unguarded.forwards_are_padded(sizes)

    @_guarded(dict)
    def take_calibration(self) -> dict[str, tuple[int, float]]:
        return self.unguarded.take_calibration()


def _empty_call(policy_version: int) -> Sequences:
    """A call that has nothing to learn from."""
    one = np.ones(1, np.int64)
    return Sequences(
        token_ids=np.zeros((1, 1), np.int32),
        lengths=one,
        prompt_lengths=one,
        prompt_keys=0 * one,
        noise_keys=np.zeros(1, np.uint64),
        sampling=SamplingParams(max_new_tokens=1),
        vocab_size=1,
        policy_version=policy_version,
    )
