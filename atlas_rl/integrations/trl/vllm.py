"""Lets TRL trainers generate with colocated vLLM engines that draft with our speculators.

There is one vLLM engine per rank or tensor-parallel group. TRL builds its own `VLLMGeneration`, with our proposer in
its `LLM`. That object is kept, because it handles the trainer's parallel groups, sleep mode, and sharded and adapted
weights. An adapter around it replaces it in the trainer.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atlas_rl.config import EngineConfig
from atlas_rl.integrations.trl.adapter import TrainerAdapter, check_attached_once, check_same_policy
from atlas_rl.integrations.trl.checks import check_tools, check_trainer
from atlas_rl.integrations.trl.kinds import kind_of
from atlas_rl.integrations.trl.sampling import TrainerSampling, read_sampling
from atlas_rl.integrations.trl.together import on_all_ranks, while_attaching
from atlas_rl.integrations.trl.whole_policy import reach_all_weights, shards
from atlas_rl.policy.unwrap import unwrap_policy
from atlas_rl.rollout.backends import vllm_draft_folder
from atlas_rl.vllm.backend import NO_DRAFTER, VllmBackend, in_this_process, llm_arguments
from atlas_rl.vllm.checks import check_sampling
from atlas_rl.vllm.internals import drafter_of

if TYPE_CHECKING:
    from atlas_rl.core import SamplingParams
    from atlas_rl.rollout.engine import RolloutEngine
    from atlas_rl.rollout.output import GenerationOutput

_FROM_TRAINER = ("repetition_penalty", "temperature", "top_p", "top_k", "min_p", "max_completion_length")
_FROM_ARGUMENTS = (
    "structured_outputs_regex",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "enable_sleep_mode",
    "model_impl",
)


@contextmanager
def drafting_engines(config: EngineConfig, **arguments: Any) -> Iterator[None]:
    """Context in which every `LLM` that TRL builds drafts with our proposer, and every server client is ours.

    Args:
        config: Its `draft_model` is the static speculator.
        arguments: Further arguments of `vllm.LLM`.

    Raises:
        ValueError: vLLM is missing or of an unknown version.
    """
    draft_folder = vllm_draft_folder(config)
    with in_this_process():
        from trl.generation import vllm_generation

        from atlas_rl.integrations.trl.server_client import our_clients

        own = vllm_generation.LLM
        vllm_generation.LLM = lambda *args, **options: own(
            *args, **llm_arguments(draft_folder, **(arguments | options))
        )
        try:
            with our_clients():
                yield
        finally:
            vllm_generation.LLM = own


def attach(engine: RolloutEngine, trainer: Any, baseline_every: int) -> VllmAdapter:
    """Put the engine around the trainer's vLLM. If it cannot, raises `ValueError` and changes nothing."""
    while_attaching(trainer, lambda: _check(engine, trainer, baseline_every))
    generation = getattr(trainer, "vllm_generation", None) or _new_generation(engine.config, trainer)
    backend = while_attaching(trainer, lambda: VllmBackend(generation.llm))
    adapter = VllmAdapter(engine, trainer, baseline_every, generation, backend)
    adapter.install()
    return adapter


def _check(engine: RolloutEngine, trainer: Any, baseline_every: int) -> None:
    """Raise `ValueError` if the engine cannot be attached, before a vLLM engine is built."""
    check_attached_once(engine, trainer)
    check_trainer(trainer, baseline_every, in_process=False)
    _check_tools(trainer)
    check_same_policy(engine, trainer)
    sampling = checked_sampling(trainer, seed=0)
    unwrap_policy(trainer.model)  # vLLM gets merged layers: weights held by a wrapper would be lost
    generation = getattr(trainer, "vllm_generation", None)
    if generation is not None:
        if drafter_of(generation.llm) is None:
            raise ValueError(NO_DRAFTER)
        _in_vllms_types(sampling, generation.structured_outputs_regex)
        return
    if not kind_of(trainer).built_later:
        raise ValueError(
            f"{type(trainer).__name__} sets up other parts together with its vLLM: build it inside of "
            "engine.prepare_vllm(), with use_vllm=True and vllm_mode='colocate'"
        )
    vllm_draft_folder(engine.config)
    if not trainer.model.name_or_path:
        raise ValueError(
            "vLLM loads the policy's checkpoint, and this policy does not say where it is: save it with "
            "save_pretrained(FOLDER), and build the trainer with model=FOLDER"
        )
    with in_this_process():
        _in_vllms_types(sampling, trainer.args.vllm_structured_outputs_regex)


def _check_tools(trainer: Any) -> None:
    """Raise `ValueError` for tools if ranks generate together, or gather the policy together in every call."""
    size = int(getattr(trainer.args, "vllm_tensor_parallel_size", 1))
    check_tools(
        trainer, size, f"vllm_tensor_parallel_size={size}", "set vllm_tensor_parallel_size=1, or generate in process"
    )
    sharder = shards(trainer)
    if sharder and getattr(trainer.args, "vllm_enable_sleep_mode", False):
        check_tools(
            trainer,
            trainer.accelerator.num_processes,
            f"vllm_enable_sleep_mode=True and {sharder}, which gathers the policy whenever vLLM wakes up,",
            "set vllm_enable_sleep_mode=False, or train with DDP or ZeRO-2",
        )


def _new_generation(config: EngineConfig, trainer: Any) -> Any:
    """Build TRL's object for `use_vllm=True`, with our proposer in it."""
    args, exact = trainer.args, {}
    if not args.bf16 and not args.fp16 and trainer.model.dtype == torch.float32:
        exact["dtype"] = "float32"  # the trainer's precision; by default vLLM would round such a policy to 16 bits
    with drafting_engines(config, **exact):
        from trl.generation.vllm_generation import VLLMGeneration

        options: dict[str, Any] = {name: getattr(trainer, name) for name in _FROM_TRAINER}
        options |= {name: getattr(args, f"vllm_{name}") for name in _FROM_ARGUMENTS}
        known = inspect.signature(VLLMGeneration.__init__).parameters
        if "trust_remote_code" in known:
            options["trust_remote_code"] = bool(getattr(args, "trust_remote_code", False))
        return VLLMGeneration(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode="colocate",
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation,
            logprobs=0,
            generation_kwargs=args.generation_kwargs,
            **options,
        )


class VllmAdapter(TrainerAdapter):
    """Generates for a trainer through TRL's own `VLLMGeneration`, with drafts, reports and an audit around it.

    Args:
        engine: Generates.
        trainer: Its sampling options are read at every generation.
        baseline_every: See `AtlasRolloutEngine.attach`.
        generation: TRL's `VLLMGeneration`, whose engine drafts with our proposer.
        backend: That engine.

    Raises:
        ValueError: Sampling options are not supported.
    """

    shares_weights = False

    def __init__(
        self, engine: RolloutEngine, trainer: Any, baseline_every: int, generation: Any, backend: VllmBackend
    ) -> None:
        self.generation, self.backend = generation, backend
        self.ranks_per_engine = backend.tensor_parallel_size
        self._has_failed = False  # whether the last sync did
        super().__init__(engine, trainer, baseline_every)
        self._reports.leads = self.backend.leads

    @property
    def llm(self) -> Any:
        """The vLLM engine."""
        return self.generation.llm

    def sync_weights(self) -> None:
        """Load the policy's weights into vLLM after an update, then refresh the drafters.

        After an error vLLM sleeps again, in sleep mode, and the next generation begins with a whole sync.
        """
        step = int(self.trainer.state.global_step)
        if self._synced_step == step and self._holds_policy:
            return
        self._has_failed = True  # until its end
        try:
            self._sync(step)
            self._has_failed = False
        finally:
            if self._has_failed:
                self._sleep()
        self._synced_step = step

    def _sync(self, step: int) -> None:
        began = time.perf_counter()
        # One by one: a rank that cannot wake up gathers no weights, and the others would wait for it there.
        self._sync_part("waking up vLLM", self._wake_up)
        self._sync_part("loading weights into vLLM", self._load)
        self.engine.synced(time.perf_counter() - began)
        if self._synced_step != step:
            self._sync_part("refreshing its drafters", lambda: self.engine.policy_updated(step=step))
        if self._synced_step is None:
            self._sync_part("making its drafters", lambda: self.engine.meet(self.backend))

    def _sync_part(self, doing: str, call: Callable[[], None]) -> None:
        """Call; an error of one rank is raised on all of them if they sync together, as in a run's first sync."""
        if self._synced_step is None or self.ranks_per_engine > 1 or shards(self.trainer):
            on_all_ranks(self.trainer.accelerator, doing, call)
        else:
            call()

    def _load(self) -> None:
        reach_all_weights(self.generation, self.trainer)
        self.backend.load_weights(self.generation._iter_named_params())

    def _generate(self, prompts: list[list[int]], asked: SamplingParams | None = None) -> GenerationOutput:
        if not self._holds_policy:
            self.sync_weights()
        own, everyone = self._of_group(prompts)
        try:
            if self.generation.enable_sleep_mode:
                self.llm.wake_up(tags=["kv_cache"])
            output = super()._generate(everyone, asked)
        finally:
            # An error may be caught, and the trainer then needs the memory.
            self._sleep()
        return replace(
            output,
            prompt_ids=output.prompt_ids[own],
            completion_ids=output.completion_ids[own],
            logprobs=output.logprobs[own],
        )

    def _of_group(self, prompts: list[list[int]]) -> tuple[slice, list[list[int]]]:
        """Position of this rank's prompts among those of its tensor-parallel group, and all prompts of the group."""
        size = self.ranks_per_engine
        if size == 1:
            return slice(None), prompts
        group = self.generation.tp_group
        gathered: list[Any] = [None] * size
        torch.distributed.all_gather_object(gathered, prompts, group=group)
        begin = sum(len(part) for part in gathered[: torch.distributed.get_rank(group=group)])
        return slice(begin, begin + len(prompts)), [prompt for part in gathered for prompt in part]

    @property
    def _holds_policy(self) -> bool:
        """Whether vLLM holds all weights of the last sync."""
        return not (self._has_failed or self.generation._llm_weights_sleeping)

    def _wake_up(self) -> None:
        if self.generation.enable_sleep_mode:
            from trl.generation.vllm_generation import empty_cache

            empty_cache()
            self.llm.wake_up(tags=["weights"])
            self.generation._llm_weights_sleeping = False

    def _sleep(self) -> None:
        if self.generation.enable_sleep_mode:
            self.generation._llm_weights_sleeping = True  # even if it fails: some weights may be lost
            self.llm.sleep(level=2)

    def _sampling(self, seed: int) -> TrainerSampling:
        return _in_vllms_types(checked_sampling(self.trainer, seed), self.generation.structured_outputs_regex)

    @contextmanager
    def _policy(self) -> Iterator[Any]:
        yield self.backend

    def _forget_prompts(self) -> None:
        """Empty the prefix cache: a rerun would find its prompts there, and the call before it would not."""
        self.llm.reset_prefix_cache()

    def _audited(self) -> nn.Module | None:
        """The trainer's policy; None if its weights are sharded, because gathering them for an audit is too expensive."""
        accelerator = self.trainer.accelerator
        deepspeed = accelerator.state.deepspeed_plugin
        if getattr(accelerator.state, "fsdp_plugin", None) is not None or (deepspeed and deepspeed.zero_stage == 3):
            return None
        return accelerator.unwrap_model(self.trainer.model)  # keeps its PEFT wrapper and mixed precision


def checked_sampling(trainer: Any, seed: int) -> TrainerSampling:
    """The trainer's sampling options. Raises `ValueError` for those that vLLM does not support under speculation."""
    sampling = read_sampling(trainer, seed)
    check_sampling(sampling.params, sampling.extra)
    return sampling


def _in_vllms_types(sampling: TrainerSampling, regex: str | None) -> TrainerSampling:
    """Options with their grammar in vLLM's type: TRL takes a regular expression, which goes first, or a dict.

    Raises:
        ValueError: vLLM does not take an option.
    """
    from vllm import SamplingParams as Params
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    extra = dict(sampling.extra)
    if regex is not None:
        extra["structured_outputs"] = {"regex": regex}
    try:
        if isinstance(extra.get("structured_outputs"), Mapping):
            extra["structured_outputs"] = StructuredOutputsParams(**extra["structured_outputs"])
        Params(max_tokens=sampling.params.max_new_tokens, **extra)
    except (TypeError, ValueError, VLLMValidationError) as reason:
        raise ValueError(f"vLLM does not take generation_kwargs {extra}: {reason}") from reason
    return replace(sampling, extra=extra)
