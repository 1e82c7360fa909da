"""Checks what drafters and controllers return, so that nothing invalid reaches a forward or compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.base import Admission, Step
from atlas_rl.core import Draft
from atlas_rl.counts import bounds


def check_draft(draft: Draft, max_draft_tokens: np.ndarray, vocab_size: int) -> None:
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
def _num_admitted(lengths: np.ndarray) -> int:
    """Number of requests with admitted tokens, or with a length that is none."""
    count = 0
    for length in lengths:
        count += length != 0
    return count


@cached_njit(nogil=True)
def _num_drafted(lengths: np.ndarray, drafters: np.ndarray, index: int, drafted: np.ndarray) -> int:
    """Number of requests whose admitted tokens exist in the draft of drafter `index`."""
    count = 0
    for row in range(len(lengths)):
        count += drafters[row] == index and 0 < lengths[row] <= drafted[row]
    return count


def checked_backlog(backlog: object) -> int | None:
    """The backlog as an int; raises `ValueError` if it is no number of tokens."""
    if backlog is None:
        return None
    if not isinstance(backlog, Integral) or backlog < 0:
        raise ValueError(f"a backlog is a number of tokens, got {backlog!r}")
    return int(backlog)


def checked_survival(survival: np.ndarray | None) -> np.ndarray | None:
    """The probabilities as float64; raises `ValueError` if they are none."""
    if survival is None:
        return None
    survival = np.asarray(survival, np.float64)
    if survival.ndim != 1 or not ((survival >= 0) & (survival <= 1)).all():
        raise ValueError("a refresh returned probabilities outside [0, 1]")
    return survival


def checked_plan(plan: dict[str, np.ndarray], step: Step) -> dict[str, np.ndarray]:
    """The plan; raises `ValueError` if it asks what cannot be asked."""
    for name, wanted in plan.items():
        if name not in step.ready or name in step.drafts or name in step.ahead:
            raise ValueError(f"a plan asks '{name}', which is not ready, has drafted already, or drafts ahead")
        asked = np.asarray(wanted)
        if asked.shape != step.room.shape or asked.dtype.kind not in "iu" or bounds(asked)[0] < 0:
            raise ValueError(f"a plan needs a number of tokens for each of {step.batch} requests")
    return plan


def checked_plan_ahead(plan: dict[str, Any], names: Sequence[str]) -> dict[str, int]:
    """The plan; raises `ValueError` if it asks what cannot be asked."""
    for name, num_tokens in plan.items():
        if name not in names:
            raise ValueError(f"a plan asks '{name}', which does not draft ahead now")
        if not isinstance(num_tokens, Integral) or num_tokens < 1:
            raise ValueError(f"a plan ahead needs a number of tokens from 1 on, got {num_tokens!r}")
    return plan


def checked_admission(admission: Admission, step: Step, speculators: Sequence[str]) -> Admission:
    """The admission as int64 arrays; raises `ValueError` if it admits tokens that were not drafted."""
    lengths, drafters = np.asarray(admission.lengths), np.asarray(admission.drafters)
    if not lengths.shape == drafters.shape == step.room.shape:
        raise ValueError(f"an admission needs a drafter and a length for each of {step.batch} requests")
    if lengths.dtype.kind not in "iu" or drafters.dtype.kind not in "iu":
        raise ValueError(f"an admission needs whole numbers, got {lengths.dtype} lengths, {drafters.dtype} drafters")
    drafters, lengths = np.ascontiguousarray(drafters, np.int64), np.ascontiguousarray(lengths, np.int64)
    missing = _num_admitted(lengths)
    for name, draft in step.drafts.items():
        missing -= _num_drafted(lengths, drafters, speculators.index(name), draft.lengths)
    if missing:
        raise ValueError("an admission has more draft tokens than were drafted")
    return Admission(drafters, lengths)
