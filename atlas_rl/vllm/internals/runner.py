"""Hooks into the model runner: our sampler instead of vLLM's, timers, hidden states for the drafter."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from atlas_rl.report.recorder import StepRecorder
from atlas_rl.vllm.draw import DrawnTokens, draw
from atlas_rl.vllm.internals.forward_time import ForwardTime
from atlas_rl.vllm.internals.repairs import repair_cpu_sampler
from atlas_rl.vllm.internals.sampler import draft_metadata, has_thinking_budgets, processed_logits, sampler_output
from atlas_rl.vllm.internals.version import INSTALLED, KNOWN_RANGE, check_version, installed_version


@dataclass(slots=True)
class ForwardBatch:
    """The rows of one forward, in vLLM's own arrays, so that a step never loops over requests.

    Attributes:
        names: vLLM's names of the requests. They differ between ranks, so use them only as dictionary keys on one rank.
        token_ids: int32 `[rows, max_model_len]`, all committed tokens.
        lengths: int64 `[rows]`, number of committed tokens.
        num_prompt_tokens: int64 `[rows]`.
        greedy: bool `[rows]`, requests that take the likeliest token.
        params_of: Returns vLLM's sampling parameters of a request, given its name.
    """

    names: list[str]
    token_ids: np.ndarray
    lengths: np.ndarray
    num_prompt_tokens: np.ndarray
    greedy: np.ndarray
    params_of: Callable[[str], Any]


@dataclass(slots=True)
class Forward:
    """Results of one forward of the policy.

    Attributes:
        batch: Its rows, newly sampled tokens included.
        num_new: int64 `[rows]`, number of tokens just committed, the first of `drawn`; 0 for a row whose prompt is not
            complete yet.
        num_drafted: int64 `[rows]`, draft tokens that were verified.
        starts: int64 `[rows]`, the row's first entry in `head_inputs`.
        head_inputs: `[positions, hidden]`, inputs of the LM head, outside of inference mode.
        layers: For each requested layer, its inputs `[tokens, hidden]` at every token of the forward.
        spans: int64 `[rows, 3]`: the row's first token in `layers`, its number of tokens, and the position of the
            first.
        drawn: Tokens that the sampler drew.
        uniform: Draft tokens that every request must have for vLLM to replay a full graph; 0 if any number will do.
    """

    batch: ForwardBatch
    num_new: np.ndarray
    num_drafted: np.ndarray
    starts: np.ndarray
    head_inputs: torch.Tensor
    layers: dict[int, torch.Tensor]
    spans: np.ndarray
    drawn: DrawnTokens
    uniform: int = 0


class Hooks(ABC):
    """Methods of a proposer that the hooks of `install` call."""

    recorder: StepRecorder
    layers: tuple[int, ...] = ()
    """Layers of the policy whose inputs the drafter reads; known before the model is loaded."""

    weights_are_whole: bool = True
    """False after a load of new weights that failed when some had changed, until one succeeds."""

    num_trainers: int = 0
    """See `transfer.Follower`."""

    @abstractmethod
    def keys(self, batch: ForwardBatch) -> np.ndarray:
        """Noise keys: uint64 `[rows]`. Equal on every rank of a tensor-parallel group."""

    @abstractmethod
    def ended(self, names: set[str]) -> None:
        """The engine has ended these requests."""

    @abstractmethod
    def weights_changed(self) -> None:
        """The engine has new weights; called on every rank."""

    @abstractmethod
    def undefined_logits(self, num_positions: int) -> None:
        """The policy's logits were not a distribution at some positions of a step."""

    @abstractmethod
    def propose_after(self, forward: Forward) -> list[list[int]]:
        """Draft tokens for every row, given the outcome of the last forward."""

    @abstractmethod
    def learn(self) -> None:
        """Do work that drafts do not wait for; called while a device runs a forward."""

    @abstractmethod
    def has_spare_time(self) -> bool:
        """Whether to call `study` while the worker waits and none of its requests runs."""

    @abstractmethod
    def study(self) -> None:
        """Learn for as long as a request may wait for it."""

    @abstractmethod
    def rest(self, *, expects_tokens: bool) -> None:
        """Something has arrived: end learning.

        Args:
            expects_tokens: It is a step, whose tokens may be learned from. If not, nothing of what is there will be.
        """


def install() -> None:
    """Install the hooks on the model runner of this process. Runners with another drafter are not affected."""
    check_version()
    repair_cpu_sampler()
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _check_signature(GPUModelRunner.propose_draft_token_ids, _PROPOSE_TAKES)
    _check_signature(GPUModelRunner._sample, ("self", "logits", "spec_decode_metadata"))
    classes: list[Any] = [GPUModelRunner]
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        classes.append(CPUModelRunner)
    for runner_class in classes:
        if INSTALLED in vars(runner_class):
            continue
        setattr(runner_class, INSTALLED, True)
        for name, hook in _HOOKS.items():
            if name in vars(runner_class):
                setattr(runner_class, name, _hooked(vars(runner_class)[name], hook))


def _check_signature(method: Callable[..., Any], expected: tuple[str, ...]) -> None:
    """Check the signature of a hooked method: a patch release may have changed it."""
    found = tuple(inspect.signature(inspect.unwrap(method)).parameters)
    if found[: len(expected)] != expected:
        raise ValueError(
            f"vLLM {installed_version()} has another {method.__qualname__} than atlas_rl knows ({found}): install another "
            f"of {KNOWN_RANGE}, or use AtlasRolloutEngine(backend='in_process')"
        )


def _hooked(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(runner: Any, *args: Any, **kwargs: Any) -> Any:
        drafter = getattr(runner, "drafter", None)
        if not isinstance(drafter, Hooks):
            return original(runner, *args, **kwargs)
        return hook(functools.partial(original, runner), runner, drafter, *args, **kwargs)

    return method


def _load_model(original: Callable[..., Any], runner: Any, drafter: Hooks, *args: Any, **kwargs: Any) -> Any:
    if drafter.layers:
        runner.use_aux_hidden_state_outputs = True
    result = original(*args, **kwargs)
    if drafter.layers:
        runner.get_model().set_aux_hidden_state_layers(drafter.layers)
    # Near the end of a request's context vLLM stops drafting for the whole batch. Our drafts are clipped instead.
    runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens + 1
    return result


def _execute_model(original: Callable[..., Any], runner: Any, drafter: Hooks, scheduled: Any, *args: Any) -> Any:
    drafter.ended(scheduled.finished_req_ids)
    new = {request.req_id for request in scheduled.scheduled_new_reqs}
    drafts = scheduled.scheduled_spec_decode_tokens
    decodes = any(
        count == 1 + len(drafts.get(name, ()))
        for name, count in scheduled.num_scheduled_tokens.items()
        if name not in new
    )
    with _forward_time(runner).running(drafter.recorder, "forward" if decodes else "prefill"):
        result = original(scheduled, *args)
    with torch.inference_mode(False), torch.no_grad():
        drafter.learn()
    return result


def _forward_time(runner: Any) -> ForwardTime:
    if not hasattr(runner, "_atlas_rl_forward_time"):
        runner._atlas_rl_forward_time = ForwardTime(runner.device)
    return runner._atlas_rl_forward_time


def _sample_tokens(original: Callable[..., Any], runner: Any, drafter: Hooks, *args: Any) -> Any:
    with drafter.recorder.time("commit"):
        return original(*args)


def _sample(original: Callable[..., Any], runner: Any, drafter: Hooks, logits: torch.Tensor, spec: Any) -> Any:
    with drafter.recorder.time("sample"):
        began_s = drafter.recorder.clock()
        batch = _batch(runner)
        spec = draft_metadata(spec, len(batch.names), logits.device)
        runner.input_batch.update_async_output_token_ids()
        metadata = runner.input_batch.sampling_metadata
        temperatures = runner.input_batch.temperature_cpu[: len(batch.names)]
        processed, truncated = processed_logits(runner.rejection_sampler, logits, spec, metadata, temperatures)
        num_drafted = np.array(spec.num_draft_tokens, np.int64)
        drawn = draw(
            processed,
            spec.draft_token_ids,
            num_drafted,
            drafter.keys(batch),
            batch.lengths,
            batch.greedy,
            truncated,
            ranked=metadata.max_num_logprobs is not None and runner.rejection_sampler.is_processed_logprobs_mode,
        )
        _forward_time(runner).settle(drafter.recorder, "sample", began_s)
        num_undefined = _num_undefined(runner, logits, drawn, truncated)
        if num_undefined:
            drafter.undefined_logits(num_undefined)
        runner._atlas_rl_drawn = batch, num_drafted, drawn
        return sampler_output(runner.rejection_sampler, logits, processed, drawn, metadata.max_num_logprobs)


def _num_undefined(runner: Any, logits: torch.Tensor, drawn: DrawnTokens, truncated: bool) -> int:
    """Number of the step's tokens whose logits the policy left undefined."""
    if drawn.undefined is None:
        return 0
    discarded = runner.discard_request_mask.np[: len(drawn.undefined)]  # their prompts are not complete yet
    index = drawn.index[drawn.undefined & ~discarded[:, None]]
    if truncated:
        # After processing, undefined logits may be the request's own doing: it can exclude every token.
        rows = logits[torch.from_numpy(index).to(logits.device)]
        return int((~rows.float().logsumexp(dim=-1).isfinite()).sum())
    return len(index)


def _propose(original: Callable[..., Any], runner: Any, drafter: Hooks, *args: Any) -> list[list[int]]:
    """Replacement of the runner's own call of the proposer, which passes neither hidden states nor requests."""
    scheduled, sampled, _, _, hidden, layers = args[:6]
    batch, num_drafted, drawn = runner._atlas_rl_drawn
    batch.lengths = _lengths(runner, batch)
    counts = num_drafted + 1
    # Drafters train on these tensors later, so they are copied outside of vLLM's inference mode.
    with torch.inference_mode(False), torch.no_grad():
        forward = Forward(
            batch=batch,
            num_new=np.fromiter(map(len, sampled), np.int64, len(sampled)),
            num_drafted=num_drafted,
            starts=np.cumsum(counts) - counts,
            head_inputs=hidden.clone(),
            layers={n: states.clone() for n, states in zip(drafter.layers, layers or (), strict=True)},
            spans=_spans(runner, scheduled, batch),
            drawn=drawn,
            uniform=_uniform(runner),
        )
        return drafter.propose_after(forward)


_PROPOSE_TAKES = (
    "self",
    "scheduler_output",
    "sampled_token_ids",
    "sampling_metadata",
    "hidden_states",
    "sample_hidden_states",
    "aux_hidden_states",
)
_GREEDY_BELOW = 1e-5  # vLLM treats lower temperatures as 0
_HOOKS: dict[str, Callable[..., Any]] = {
    "load_model": _load_model,
    "execute_model": _execute_model,
    "sample_tokens": _sample_tokens,
    "_sample": _sample,
    "propose_draft_token_ids": _propose,
}


def _uniform(runner: Any) -> int:
    """See `Forward.uniform`. vLLM chooses its graph mode by the attention backend when the first request runs.

    0 if a request limits its thinking: tokens that fill its draft up would move the limit.
    """
    if has_thinking_budgets(runner.input_batch.sampling_metadata):
        return 0
    mode = runner.cudagraph_dispatcher.cudagraph_mode
    return runner.uniform_decode_query_len - 1 if mode.separate_routine() and mode.has_full_cudagraphs() else 0


def _batch(runner: Any) -> ForwardBatch:
    rows, names = runner.input_batch, list(runner.input_batch.req_ids)
    batch = ForwardBatch(
        names=names,
        token_ids=rows.token_ids_cpu,
        lengths=np.zeros(0, np.int64),
        num_prompt_tokens=rows.num_prompt_tokens[: len(names)].astype(np.int64),
        greedy=rows.temperature_cpu[: len(names)] < _GREEDY_BELOW,
        params_of=lambda name: runner.requests[name].sampling_params,
    )
    batch.lengths = _lengths(runner, batch)
    return batch


def _lengths(runner: Any, batch: ForwardBatch) -> np.ndarray:
    return runner.input_batch.num_tokens_no_spec[: len(batch.names)].astype(np.int64)


def _spans(runner: Any, scheduled: Any, batch: ForwardBatch) -> np.ndarray:
    counts = np.fromiter(map(scheduled.num_scheduled_tokens.__getitem__, batch.names), np.int64, len(batch.names))
    computed = runner.input_batch.num_computed_tokens_cpu[: len(counts)].astype(np.int64)
    return np.stack([np.cumsum(counts) - counts, counts, computed], axis=1)
