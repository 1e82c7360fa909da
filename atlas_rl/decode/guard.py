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
from operator import methodcaller
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from atlas_rl.controller.base import Admission, Controller, Step
from atlas_rl.core import Draft, Prompts, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.decode.checked import check_draft, checked_admission, checked_backlog, checked_plan, checked_survival
from atlas_rl.policy.captures import Captured
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
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
                else f"{name}: {where}() raised {kind}: {text}; it is off until the next policy update"
            ] = None
        if (name, where, kind) not in self._logged:
            self._logged.add((name, where, kind))
            logger.error("atlas_rl: %s: %s() raised; generation goes on without it", name, where, exc_info=error)


class GuardedSpeculator(Speculator):
    """Wraps a speculator and catches its errors; other attributes are passed through.

    Args:
        speculator: Speculator to guard.
        faults: Receives the caught errors.

    Attributes:
        unguarded: The wrapped speculator.
    """

    def __init__(self, speculator: Speculator, faults: Faults) -> None:
        self.unguarded = speculator
        self.name, self.needs, self.observes_late = speculator.name, speculator.needs, speculator.observes_late
        self._faults = faults
        self._policy: PolicyView | None = None
        self._version = -1  # of the policy at the latest call
        self._off_at: int | None = None  # the policy's version when it failed

    def __getattr__(self, name: str) -> Any:
        if name == "unguarded":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.unguarded, name)

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Bind the speculator. Errors are raised, not caught: the caller chose this speculator."""
        self.unguarded.bind(policy, couples_noise)
        self._policy = policy
        self.needs, self._off_at = self.unguarded.needs, None

    def compile_for(self, sampling: SamplingParams) -> None:
        self._try("compile_for", lambda: self.unguarded.compile_for(sampling), None)

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        self._version = sequences.policy_version
        self._try("start", methodcaller("start", sequences, requests, prompts, cache), None, self.unguarded)

    # The next four run in every step, and the device waits for three of them: they go through no helper.

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        if self._off_at is not None:
            return None
        try:
            backlog = self.unguarded.backlog(sequences, requests)
            return backlog if type(backlog) is int and backlog >= 0 else checked_backlog(backlog)
        except Exception as error:  # noqa: BLE001 - see `Faults.attempt`
            self._failed("backlog", error)
            return None

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        if self._off_at is None:
            try:
                draft = self.unguarded.propose(sequences, requests, max_draft_tokens)
                check_draft(draft, max_draft_tokens, sequences.vocab_size)
                if draft.draft_probs is not None and self._policy is not None:
                    # The drafter may work on another device.
                    draft.draft_probs = draft.draft_probs.to(self._policy.device)
                return draft
            except Exception as error:  # noqa: BLE001 - see `Faults.attempt`
                self._failed("propose", error)
        return Draft.empty(len(requests))

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        if self._off_at is None:
            try:
                self.unguarded.observe(sequences, verified)
            except Exception as error:  # noqa: BLE001 - see `Faults.attempt`
                self._failed("observe", error)

    def learn(self) -> None:
        if self._off_at is None:
            try:
                self.unguarded.learn()
            except Exception as error:  # noqa: BLE001 - see `Faults.attempt`
                self._failed("learn", error)

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        if policy_version != self._off_at:
            self._off_at = None
        self._version = policy_version
        return self._try("refresh", lambda: checked_survival(self.unguarded.refresh(rollouts, policy_version)), None)

    def shared(self) -> torch.Tensor | None:
        return self._try("shared", methodcaller("shared"), None, self.unguarded)

    def take_shared(self, total: torch.Tensor) -> None:
        self._try("take_shared", lambda: self.unguarded.take_shared(total), None)

    def take_captured(self) -> Captured:
        return self._try("take_captured", methodcaller("take_captured"), Captured(), self.unguarded)

    def weights(self) -> Iterable[torch.Tensor]:
        return self._try("weights", lambda: tuple(self.unguarded.weights()), ())

    def state_dict(self) -> dict[str, Any]:
        """State of the speculator, of one that is off as well: an error in drafting must not cost what it has learned."""
        off_at, self._off_at = self._off_at, None
        state = self._try("state_dict", methodcaller("state_dict"), NOT_SAVED, self.unguarded)
        self._off_at = off_at if self._off_at is None else self._off_at
        if state is NOT_SAVED:
            logger.warning("atlas_rl: nothing of the drafter '%s' is saved: its state_dict() raised", self.name)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unguarded.load_state_dict(state)

    def _try(self, where: str, call: Callable[..., Value], otherwise: Value, *arguments: Any) -> Value:
        """Call a method through `Faults.attempt`; a missing method counts as a failure of the drafter, too."""
        if self._off_at is not None:
            return otherwise
        result, went_well = self._faults.attempt(self.name, where, call, otherwise, *arguments)
        if not went_well:
            self._turn_off()
        return result

    def _failed(self, where: str, error: Exception) -> None:
        self._faults.note(self.name, where, error)
        self._turn_off()

    def _turn_off(self) -> None:
        self._off_at = self._version
        # An empty call ends the present one, whose state may be inconsistent after the error.
        with suppress(Exception):
            self.unguarded.start(_empty_call(self._version), np.zeros(0, np.int64))


class GuardedController(Controller):
    """Wraps a controller and catches its errors; after an error nothing is drafted.

    Args:
        controller: Controller to guard.
        faults: Receives the caught errors.
    """

    def __init__(self, controller: Controller, faults: Faults) -> None:
        self.unguarded, self.speculators = controller, controller.speculators
        self._faults, self._off = faults, False

    def __getattr__(self, name: str) -> Any:
        if name == "unguarded":
            raise AttributeError(name)
        return getattr(self.unguarded, name)

    # The next three run in every step, and the device waits for two of them: they go through no helper.

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        if not self._off:
            try:
                return checked_plan(self.unguarded.plan(step), step)
            except Exception as error:  # noqa: BLE001 - see `Faults.attempt`
                self._failed("plan", error)
        return {}

    def admit(self, step: Step) -> Admission:
        if not self._off:
            try:
                return checked_admission(self.unguarded.admit(step), step, self.speculators)
            except Exception as error:  # noqa: BLE001 - see `Faults.attempt`
                self._failed("admit", error)
        return Admission(np.zeros(step.batch, np.int64), np.zeros(step.batch, np.int64))

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        if not self._off:
            try:
                return self.unguarded.observe(step, admission, verified, forward_s, step_s)
            except Exception as error:  # noqa: BLE001 - see `Faults.attempt`
                self._failed("observe", error)
        return None

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        self._off = False
        self._try("policy_updated", lambda: self.unguarded.policy_updated(expected), None)

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        return self._try(
            "plain_forward_s", methodcaller("plain_forward_s", batch, context_tokens), None, self.unguarded
        )

    def forwards_are_padded(self, sizes: Sequence[int]) -> None:
        self._try("forwards_are_padded", methodcaller("forwards_are_padded", sizes), None, self.unguarded)

    def take_calibration(self) -> dict[str, tuple[int, float]]:
        return self._try("take_calibration", methodcaller("take_calibration"), {}, self.unguarded)

    def _try(self, where: str, call: Callable[..., Value], otherwise: Value, *arguments: Any) -> Value:
        if self._off:
            return otherwise
        result, went_well = self._faults.attempt("controller", where, call, otherwise, *arguments)
        self._off = not went_well
        return result

    def _failed(self, where: str, error: Exception) -> None:
        self._faults.note("controller", where, error)
        self._off = True


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
