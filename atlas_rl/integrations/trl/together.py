"""Collective steps of a trainer's ranks that fail on all ranks if they fail on one.

A rank that raises alone never reaches the next collective, where the others then wait until the timeout of their
process group: half an hour with gloo. So whatever can raise right before a collective of ours runs in a function of
this module. A rank that fails still takes part in the exchange and tells the others, and every rank raises.

All ranks must call these functions equally often and in the same order. `call` itself must not communicate, unless it
does so equally on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

Value = TypeVar("Value")

_KINDS = (ConnectionError, ValueError)
"""Errors whose kind the other ranks are told; all others become `RuntimeError`."""


def of_all_ranks(accelerator: Any, doing: str, call: Callable[[], Value]) -> list[Value]:
    """Results of `call` on all ranks, in the order of ranks.

    Args:
        accelerator: The trainer's `Accelerator`.
        doing: What `call` does, for the message: "merging reports".
        call: Its result must be picklable.

    Raises:
        RuntimeError: `call` failed on another rank; the message has that rank and its error. The rank itself raises its
            own error.
    """
    if accelerator.num_processes == 1:
        return [call()]
    try:
        told = (call(), "")
    except Exception as error:
        gather_object([(None, f"{type(error).__name__}: {error}")])
        raise
    everyone = gather_object([told])
    for rank, (_, failure) in enumerate(everyone):
        if failure:
            raise RuntimeError(f"rank {rank} failed while {doing}: {failure}")
    return [value for value, _ in everyone]


def on_all_ranks(accelerator: Any, doing: str, call: Callable[[], Value]) -> Value:
    """Result of `call` on this rank, which no other rank gets; raises like `of_all_ranks`."""
    own: list[Value] = []
    of_all_ranks(accelerator, doing, lambda: own.append(call()))
    return own[0]


def while_attaching(trainer: Any, call: Callable[[], Value]) -> Value:
    """Result of `call`, which checks a trainer or builds an engine's part; raises like `of_all_ranks`.

    A rank that raised alone would leave the others in their first collective of `trainer.train()`.
    """
    accelerator = getattr(trainer, "accelerator", None)
    return call() if accelerator is None else on_all_ranks(accelerator, "attaching the engine", call)


def of_main_rank(accelerator: Any, call: Callable[[], Value]) -> Value:
    """Result of `call` on the main process, returned on every rank.

    Raises:
        Exception: That of `call`, on the main process. The other ranks raise a ConnectionError, ValueError or
            RuntimeError with the same message.
    """
    told: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            told = [(call(), None)]
        except Exception as error:
            kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
            broadcast_object_list([(None, kind(str(error)))], from_process=0)
            raise
    broadcast_object_list(told, from_process=0)
    value, failure = told[0]
    if failure is not None:
        raise failure
    return value
