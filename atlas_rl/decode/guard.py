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
from numbers import Integral
from operator import methodcaller
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.base import Admission, Controller, Step
from atlas_rl.core import Draft, Prompts, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.counts import bounds
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.speculators.base import NO_PROMPTS, Speculator

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
            self._note(name, where, error)
            return otherwise, False

    def report_to(self, recorder: StepRecorder) -> None:
        """Hand over the caught errors to a recorder, once."""
        recorder.faults(self._counts, self._messages)
        self._counts, self._messages = {}, {}

    def _note(self, name: str, where: str, error: Exception) -> None:
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
        self.name, self.needs = speculator.name, speculator.needs
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

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        return self._try("backlog", self._backlog, None, sequences, requests)

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        draft = self._try("propose", self._propose, None, sequences, requests, max_draft_tokens)
        return Draft.empty(len(requests)) if draft is None else draft

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        self._try("observe", methodcaller("observe", sequences, verified), None, self.unguarded)

    def learn(self) -> None:
        self._try("learn", methodcaller("learn"), None, self.unguarded)

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        if policy_version != self._off_at:
            self._off_at = None
        self._version = policy_version
        return self._try("refresh", lambda: _checked_survival(self.unguarded.refresh(rollouts, policy_version)), None)

    def shared(self) -> torch.Tensor | None:
        return self._try("shared", methodcaller("shared"), None, self.unguarded)

    def take_shared(self, total: torch.Tensor) -> None:
        self._try("take_shared", lambda: self.unguarded.take_shared(total), None)

    def weights(self) -> Iterable[torch.Tensor]:
        return self._try("weights", lambda: tuple(self.unguarded.weights()), ())

    def state_dict(self) -> dict[str, Any]:
        return self._try("state_dict", methodcaller("state_dict"), {}, self.unguarded)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unguarded.load_state_dict(state)

    def _backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        backlog = self.unguarded.backlog(sequences, requests)
        return backlog if type(backlog) is int and backlog >= 0 else _checked_backlog(backlog)

    def _propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft | None:
        draft = self.unguarded.propose(sequences, requests, max_draft_tokens)
        _check_draft(draft, max_draft_tokens, sequences.vocab_size)
        if draft.draft_probs is not None and self._policy is not None:
            draft.draft_probs = draft.draft_probs.to(self._policy.device)  # the drafter may work on another device
        return draft

    def _try(self, where: str, call: Callable[..., Value], otherwise: Value, *arguments: Any) -> Value:
        """Call a method through `Faults.attempt`; a missing method counts as a failure of the drafter, too."""
        if self._off_at is not None:
            return otherwise
        result, went_well = self._faults.attempt(self.name, where, call, otherwise, *arguments)
        if not went_well:
            self._off_at = self._version
            # An empty call ends the present one, whose state may be inconsistent after the error.
            with suppress(Exception):
                self.unguarded.start(_empty_call(self._version), np.zeros(0, np.int64))
        return result


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

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        return self._try("plan", self._plan, {}, step)

    def admit(self, step: Step) -> Admission:
        admission = self._try("admit", self._admit, None, step)
        if admission is None:
            return Admission(np.zeros(step.batch, np.int64), np.zeros(step.batch, np.int64))
        return admission

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        return self._try(
            "observe", methodcaller("observe", step, admission, verified, forward_s, step_s), None, self.unguarded
        )

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

    def _plan(self, step: Step) -> dict[str, np.ndarray]:
        return _checked_plan(self.unguarded.plan(step), step)

    def _admit(self, step: Step) -> Admission | None:
        admission = self.unguarded.admit(step)
        lengths, drafters = np.asarray(admission.lengths), np.asarray(admission.drafters)
        if lengths.shape != (step.batch,) or drafters.shape != (step.batch,):
            raise ValueError(f"an admission needs a drafter and a length for each of {step.batch} requests")
        if lengths.dtype.kind not in "iu" or drafters.dtype.kind not in "iu":
            raise ValueError(
                f"an admission needs whole numbers, got {lengths.dtype} lengths, {drafters.dtype} drafters"
            )
        drafters, lengths = np.ascontiguousarray(drafters, np.int64), np.ascontiguousarray(lengths, np.int64)
        drafted = sum(
            _num_drafted(lengths, drafters, self.speculators.index(name), draft.lengths)
            for name, draft in step.drafts.items()
        )
        if drafted != np.count_nonzero(lengths):
            raise ValueError("an admission has more draft tokens than were drafted")
        return Admission(drafters, lengths)

    def _try(self, where: str, call: Callable[..., Value], otherwise: Value, *arguments: Any) -> Value:
        if self._off:
            return otherwise
        result, went_well = self._faults.attempt("controller", where, call, otherwise, *arguments)
        self._off = not went_well
        return result


def _check_draft(draft: Draft, max_draft_tokens: np.ndarray, vocab_size: int) -> None:
    """Raise `ValueError` for a draft that cannot be verified."""
    batch, width = len(max_draft_tokens), draft.token_ids.shape[-1]
    if draft.token_ids.shape != (batch, width) or draft.confidence.shape != (batch, width):
        raise ValueError(
            f"a draft of {batch} requests has token_ids {draft.token_ids.shape}, confidence {draft.confidence.shape}"
        )
    if (
        draft.lengths.shape != (batch,)
        or draft.lengths.dtype.kind not in "iu"
        or draft.token_ids.dtype.kind not in "iu"
    ):
        raise ValueError(f"a draft of {batch} requests has lengths {draft.lengths.shape} {draft.lengths.dtype}")
    probs = draft.draft_probs
    if probs is None and _can_be(
        np.ascontiguousarray(draft.token_ids, np.int64),
        np.ascontiguousarray(draft.confidence, np.float32),
        np.ascontiguousarray(draft.lengths, np.int64),
        np.ascontiguousarray(max_draft_tokens, np.int64),
        vocab_size,
    ):
        return
    if (draft.lengths < 0).any() or (draft.lengths > np.minimum(max_draft_tokens, width)).any():
        raise ValueError(
            f"a draft has lengths up to {draft.lengths.max()}, of {width} tokens, more than it was asked for"
        )
    drafted = np.arange(width)[None] < draft.lengths[:, None]
    if ((draft.token_ids < 0) | (draft.token_ids >= vocab_size))[drafted].any():
        raise ValueError(f"a draft has tokens outside the policy's vocabulary of {vocab_size}")
    if not ((draft.confidence >= 0) & (draft.confidence <= 1))[drafted].all():
        raise ValueError("a draft has confidences outside [0, 1]")
    if probs is None:
        return
    if probs.shape != (batch, width, vocab_size):
        raise ValueError(f"a draft of {batch} requests has draft_probs {tuple(probs.shape)}")
    # On a GPU the host waits for the answer; drafters that fetch their drafts have it already.
    if not draft.probs_are_checked and not torch.isfinite(probs).all():
        raise ValueError("a draft has draft_probs that are not finite")


@cached_njit(nogil=True)
def _can_be(tokens: np.ndarray, confidence: np.ndarray, lengths: np.ndarray, most: np.ndarray, vocab_size: int) -> bool:
    """Whether lengths, tokens and confidences are within bounds, in one pass."""
    for row in range(len(lengths)):
        if not 0 <= lengths[row] <= min(most[row], tokens.shape[1]):
            return False
        for column in range(lengths[row]):
            if not (0 <= tokens[row, column] < vocab_size and 0 <= confidence[row, column] <= 1):
                return False
    return True


@cached_njit(nogil=True)
def _num_drafted(lengths: np.ndarray, drafters: np.ndarray, index: int, drafted: np.ndarray) -> int:
    """Number of requests whose admitted tokens exist in the draft of drafter `index`."""
    count = 0
    for row in range(len(lengths)):
        count += drafters[row] == index and 0 < lengths[row] <= drafted[row]
    return count


def _checked_backlog(backlog: object) -> int | None:
    if backlog is None:
        return None
    if not isinstance(backlog, Integral) or backlog < 0:
        raise ValueError(f"a backlog is a number of tokens, got {backlog!r}")
    return int(backlog)


def _checked_survival(survival: np.ndarray | None) -> np.ndarray | None:
    if survival is None:
        return None
    survival = np.asarray(survival, np.float64)
    if survival.ndim != 1 or not ((survival >= 0) & (survival <= 1)).all():
        raise ValueError("a refresh returned probabilities outside [0, 1]")
    return survival


def _checked_plan(plan: dict[str, np.ndarray], step: Step) -> dict[str, np.ndarray]:
    for name, wanted in plan.items():
        if name not in step.ready or name in step.drafts:
            raise ValueError(f"a plan asks '{name}', which is not ready or has drafted already")
        asked = np.asarray(wanted)
        if asked.shape != (step.batch,) or asked.dtype.kind not in "iu" or bounds(asked)[0] < 0:
            raise ValueError(f"a plan needs a number of tokens for each of {step.batch} requests")
    return plan


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
