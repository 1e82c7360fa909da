"""Lets the drafter learn while the engine waits for work, in pieces between which the engine looks for work.

A worker waits in one of two places. A process of its own waits for calls of the executor; one in the engine's process,
as with one GPU, waits where the engine waits for requests. The drafter learns there, on the worker's own thread and
stream, so it needs no lock. Work that arrives waits for the end of a piece at most.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from atlas_rl.vllm.internals.runner import Hooks
from atlas_rl.vllm.internals.version import INSTALLED, since

logger = logging.getLogger(__name__)

_BESIDE_LEARNING = ("atlas_report", "atlas_status")
"""Calls that a trainer makes after its rollouts; learning goes on after them."""
_OF_STEPS = ("execute_model", "sample_tokens", "take_draft_token_ids")
"""Calls with new tokens to learn from. All others may bring new weights, or take the device away."""


def no_spare_time(num_replicas: int) -> str | None:
    """Why drafters cannot learn while their engine waits; None if they can.

    Args:
        num_replicas: Data-parallel replicas of the engine.
    """
    if num_replicas > 1:
        return "with data parallelism, replicas that wait run along with the others' forwards"
    return None if since("0.32") else "it takes vLLM 0.32"


def study_while_waiting(parallel_config: Any) -> None:
    """Install the hooks in this process. If the engine has no spare time there are none, and one of its workers says so."""
    why_not = no_spare_time(parallel_config.data_parallel_size)
    if why_not is not None:
        if parallel_config.rank == 0 and parallel_config.data_parallel_index == 0:
            logger.warning("atlas_rl: idle_learning is on, but drafters cannot learn in idle time: %s", why_not)
        return
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.executor.multiproc_executor import WorkerProc
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    for owner, name, hook in (
        (WorkerProc, "worker_busy_loop", _worker_busy_loop),
        (EngineCoreProc, "_process_input_queue", _process_input_queue),
        (UniProcExecutor, "collective_rpc", _collective_rpc),
    ):
        original = getattr(owner, name)
        if not hasattr(original, INSTALLED):
            setattr(owner, name, _hooked(original, hook))


def _hooked(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(waiting: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(functools.partial(original, waiting), waiting, *args, **kwargs)

    setattr(method, INSTALLED, True)
    return method


def _worker_busy_loop(original: Callable[..., Any], process: Any) -> Any:
    queue, runner = process.rpc_broadcast_mq, process.worker.model_runner
    drafter = _drafter_of(runner)
    if drafter is not None:
        queue.dequeue = functools.partial(_next_call, queue.dequeue, queue, runner, drafter)
    return original()


def _next_call(read: Callable[..., Any], queue: Any, runner: Any, drafter: Hooks, *args: Any, **kwargs: Any) -> Any:
    """The executor's next call, for which the worker waits. If the engine has died, `read` raises as without us."""
    call = None
    while call is None and not queue.shutting_down and _has_spare_time(runner, drafter):
        call = _poll(read, queue)
        if call is None:
            _study(drafter)
    if call is None:
        call = read(*args, **kwargs)
    _tell(drafter, call[0])
    return call


def _poll(read: Callable[..., Any], queue: Any) -> Any:
    """The next call, or None if there is none yet.

    A message that is too large for a slot of the queue's ring is sent after its slot is marked as written. A poll between
    the two takes the slot and finds no message, so the message has to be waited for: no other read would take it.
    """
    slot = queue.current_idx
    try:
        return read(timeout=0)
    except TimeoutError:
        return None if queue.current_idx == slot else queue.recv(queue.local_socket, None)


def _process_input_queue(original: Callable[..., Any], core: Any) -> Any:
    queue, runner = core.input_queue, _runner_in_this_process(core.model_executor)
    drafter = _drafter_of(runner)
    if drafter is not None and "get" not in vars(queue):
        queue.get = functools.partial(_next_request, queue.get, queue, runner, drafter)
    return original()


def _next_request(
    read: Callable[..., Any], queue: Any, runner: Any, drafter: Hooks, block: bool = True, timeout: float | None = None
) -> Any:
    """The next request or call of the engine, which has no work if it blocks."""
    while block and queue.empty() and _has_spare_time(runner, drafter):
        _study(drafter)
    return read(block, timeout)


def _collective_rpc(original: Callable[..., Any], executor: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    drafter = _drafter_of(_runner_in_this_process(executor))
    if drafter is not None:
        _tell(drafter, method)
    return original(method, *args, **kwargs)


def _has_spare_time(runner: Any, drafter: Hooks) -> bool:
    return not runner.requests and drafter.has_spare_time()


def _tell(drafter: Hooks, method: Any) -> None:
    if method not in _BESIDE_LEARNING:
        drafter.rest(expects_tokens=method in _OF_STEPS)


def _study(drafter: Hooks) -> None:
    with torch.inference_mode(False), torch.no_grad():
        drafter.study()


def _runner_in_this_process(executor: Any) -> Any:
    """The model runner of an executor whose worker is in this process and has been built; else None."""
    return getattr(getattr(getattr(executor, "driver_worker", None), "worker", None), "model_runner", None)


def _drafter_of(runner: Any) -> Hooks | None:
    drafter = getattr(runner, "drafter", None)
    return drafter if isinstance(drafter, Hooks) else None
