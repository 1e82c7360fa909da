"""Lets TRL trainers that can use vLLM generate with the engine, in the trainer's process.

The interface is the object that TRL keeps for vLLM. Trainers call `trainer.vllm_generation` to sync weights and to
generate, whatever object it is. An adapter with the same two methods keeps every feature of that path:
importance-sampling correction, tools, environments, evaluation. The trainer is built with `use_vllm=False`, so vLLM is
never loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from atlas_kernels.noise import mix64
from atlas_rl.checks import shown
from atlas_rl.integrations.trl.checks import check_gathering, is_whole
from atlas_rl.integrations.trl.drafter_state import DrafterStateCallback
from atlas_rl.integrations.trl.exchange import ExchangeCallback
from atlas_rl.integrations.trl.importance import ImportanceCheck
from atlas_rl.integrations.trl.kinds import kind_of
from atlas_rl.integrations.trl.reports import ReportCallback
from atlas_rl.integrations.trl.runs import RunCallback
from atlas_rl.integrations.trl.sampling import (
    OPTIONS,
    TrainerSampling,
    beyond_its_attributes,
    left_to_the_policy,
    read_sampling,
    with_suppressed,
)
from atlas_rl.integrations.trl.together import on_all_ranks, while_attaching
from atlas_rl.integrations.trl.whole_policy import shards, whole_policy
from atlas_rl.policy.supported import context_of
from atlas_rl.policy.unwrap import unwrap_policy
from atlas_rl.report.report import Mode, StepReport, rerun_tokens_per_s, with_sync

if TYPE_CHECKING:
    from atlas_rl.core import SamplingParams
    from atlas_rl.rollout.engine import RolloutEngine
    from atlas_rl.rollout.output import GenerationOutput

Value = TypeVar("Value")


def adapter_of(trainer: Any) -> TrainerAdapter | None:
    """The adapter through which a trainer generates with an engine; None if it does not."""
    present = getattr(trainer, "atlas_adapter", None) or getattr(trainer, "vllm_generation", None)
    return present if isinstance(present, TrainerAdapter) else None


def check_attached_once(engine: RolloutEngine, trainer: Any) -> None:
    """Raise `ValueError` if an engine is already attached to the trainer."""
    present = adapter_of(trainer)
    if present is not None:
        if present.engine is engine:
            raise ValueError("the trainer already generates with this engine: attach once")
        raise ValueError("the trainer already generates with another engine: build a new trainer for this one")


def check_same_policy(engine: RolloutEngine, trainer: Any) -> None:
    """Raise `ValueError` if the engine was made for another policy than the trainer's."""
    model = engine.model
    if model is None or (isinstance(model, nn.Module) and unwrap_policy(model) is unwrap_policy(trainer.model)):
        return
    raise ValueError(
        f"this engine was made with model={shown(model)}, which is not the trainer's policy: leave model= out, "
        "AtlasRolloutEngine().attach(trainer) takes the trainer's"
    )


def rollout_func(engine: RolloutEngine, trainer: Any) -> TrainerAdapter:
    """The adapter for `GRPOTrainer(rollout_func=engine)`, which the trainer calls; made at its first call.

    The first call is in the middle of `train`. If that run resumes, the drafters are restored then, from the trainer's
    output folder, because the folder that it resumed from is no longer known. Later runs restore them when they begin.

    Raises:
        ValueError: The trainer asks for an option that the engine does not have.
    """
    present = adapter_of(trainer)
    if present is not None and present.engine is engine:
        return present

    def check() -> None:
        check_gathering(trainer)
        sampling_in_process(trainer, seed=0)
        if is_whole(trainer):
            engine.meet(trainer.model)

    while_attaching(trainer, check)
    adapter = TrainerAdapter(engine, trainer, baseline_every=0)
    trainer.atlas_adapter = adapter
    if trainer.state.global_step > 0:
        adapter.drafter_state.restore(trainer.args, trainer.state)
    return adapter


def sampling_in_process(trainer: Any, seed: int) -> TrainerSampling:
    """The trainer's sampling options. Raises `ValueError` for those that the in-process engine lacks."""
    of_policy, of_trainer = left_to_the_policy(trainer), beyond_its_attributes(trainer)
    sampling = with_suppressed(read_sampling(trainer, seed, of_policy | of_trainer))
    if sampling.extra:
        asked = getattr(trainer.args, "generation_kwargs", None) or {}
        found: dict[str, dict[str, Any]] = {}
        for name, value in sampling.extra.items():
            where = "generation_kwargs"
            if asked.get(name) is None and name in of_policy | of_trainer:
                where = f"the {'trainer' if name in of_trainer else 'policy'}'s generation_config"
            found.setdefault(where, {})[name] = value
        listed = " and ".join(f"{where} {entries}" for where, entries in found.items())
        raise ValueError(
            f"{listed} cannot be honoured in process: {sorted((*OPTIONS, 'suppress_tokens'))} are supported, and others "
            "only with values that have no effect. Set them to None"
        )
    return sampling


class TrainerAdapter:
    """Generates for a trainer in place of `trl.generation.vllm_generation.VLLMGeneration`.

    Trainers call `sync_weights`, `generate` and `llm`. A subclass for another engine overrides `llm` and
    `sync_weights`, the two class attributes, and five hooks: `_mode` is the purpose of a call, `_sampling` its
    supported options, `_policy` the policy that generates, `_audited` the policy that its samples are compared with,
    and `_forget_prompts` empties caches. It may also wrap `_generate`, which is one generation call.

    Args:
        engine: Generates.
        trainer: The trainer. Its sampling options are read at every generation, so that schedules on them work. GRPO and
            RLOO go on scoring at the temperature that they were built with; `ImportanceCheck` corrects or warns.
        baseline_every: See `AtlasRolloutEngine.attach`.

    Raises:
        ValueError: The trainer asks for sampling options that the engine does not have.
    """

    shares_weights: bool = True
    """Whether rollouts are sampled from the trainer's own weights, whose importance ratios are 1."""

    drafts_here: bool = True
    """Whether drafters live in the trainer's processes, which then save what they know and exchange rollouts."""

    ranks_per_engine: int = 1
    """Ranks that generate the same rollouts together. They share the seed."""

    def __init__(self, engine: RolloutEngine, trainer: Any, baseline_every: int) -> None:
        self.engine = engine
        self.trainer = trainer
        self.baseline_every = baseline_every
        self._calls_at_step: dict[tuple[int, str], int] = {}
        self._train_calls = 0
        self._synced_step: int | None = None
        self._runs = RunCallback(self._begin_run, self._policy_changed)
        self._sampling(seed=0)  # refuse unsupported options before the trainer is changed
        built_at = float(trainer.args.temperature) if kind_of(trainer).scores_as_built else None
        spare = self.shares_weights and engine.config.spare_importance_sampling
        self._importance = ImportanceCheck(trainer, spare, built_at)
        self._reports = ReportCallback(engine, trainer)
        # Some steps may learn from the dataset's own completions.
        self._reports.may_pause = getattr(trainer, "lmbda", 1.0) < 1.0
        self.drafter_state = DrafterStateCallback(engine, trainer)
        exchange = ExchangeCallback(trainer)
        self._exchange = exchange if trainer.accelerator.num_processes > 1 and self.drafts_here else None
        of_drafters = (self.drafter_state, exchange) if self.drafts_here else ()
        for callback in (self._runs, self._reports, self._importance, *of_drafters):
            trainer.add_callback(callback)
        # Here and not in `install`, which `rollout_func` does without.
        self._reports.follow()
        self._runs.follow(trainer)
        if self.drafts_here:
            self.drafter_state.follow()

    def install(self) -> None:
        """Replace the trainer's vLLM engine."""
        self.trainer.use_vllm = True
        self.trainer.vllm_generation = self
        self.trainer._last_loaded_step = -1  # sync before the first generation

    @property
    def llm(self) -> Any:
        """Stands in for `vllm.LLM`: TRL's tool loop reads `llm.llm_engine.model_config.max_model_len`, in tokens."""
        model = self.trainer.model
        limit = context_of(model, model.config.get_text_config()) or 1 << 30
        return SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=limit)))

    def sync_weights(self) -> None:
        """Refresh the drafters after a policy update. Weights are shared, so nothing is copied."""
        step = int(self.trainer.state.global_step)
        if self._synced_step != step:
            self.engine.policy_updated(step=step)
            self._synced_step = step

    def _begin_run(self) -> None:
        """Give the run's calls the seeds that they have in any process: those of an interrupted step do not count."""
        self._calls_at_step = {}

    def _policy_changed(self) -> None:
        """Sync before the next generation, whatever its step: the policy is not the one of that step."""
        self._synced_step = None
        # The steps at which trainers last asked for a sync: GOLD and IW-OPD have the second.
        self.trainer._last_loaded_step = -1
        self.trainer._last_vllm_sync_step = -int(getattr(self.trainer, "vllm_sync_frequency", 1))

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """Generate one completion per prompt; the trainer has repeated each prompt `num_generations` times.

        Returns:
            Prompt ids, completion ids, logprobs and token ids. The last two have a list of one entry per token, because
            TRL expects several candidates per position.

        Raises:
            ValueError: The prompts contain images.
        """
        refuse_images(images)
        with profiler or nullcontext():
            output = self._generate(prompts)
        logprobs = [[[value] for value in row] for row in output.logprobs]
        token_ids = [[[token] for token in row] for row in output.completion_ids]
        return output.prompt_ids, output.completion_ids, logprobs, token_ids

    def rollout_func(self, prompts: list[Any]) -> dict[str, Any]:
        """Generate as TRL's `rollout_func`: one row per prompt, which the trainer has already repeated.

        Raises:
            ValueError: The prompts contain images.
        """
        prompt_ids, images, _ = self.trainer._tokenize_prompts(prompts)
        refuse_images(images)
        self.sync_weights()
        output = self._generate(prompt_ids)
        return {
            "prompt_ids": output.prompt_ids,
            "completion_ids": output.completion_ids,
            "logprobs": output.logprobs,
        }

    def _generate(self, prompts: list[list[int]], asked: SamplingParams | None = None) -> GenerationOutput:
        """Run one generation call, compare it with a rerun if one is due, and report.

        `asked` are the sampling options of this call, None for the trainer's. The seed is always the adapter's.
        """
        step, mode = int(self.trainer.state.global_step), self._mode()
        if self._exchange is not None:
            self.engine.share_rollouts(self._exchange)  # another trainer may have used the engine
        # An evaluation decides nothing: the trainer may go on with rollouts that were made as it had decided before.
        if mode == "train" and asked is None and not self._calls_at_step.get((step, mode)):
            self._importance.begin_step(lambda: self._sampling(seed=0).params)
        seed = self._seed(step, mode)

        def sampling() -> TrainerSampling:
            return self._sampling(seed) if asked is None else TrainerSampling(replace(asked, seed=seed), {})

        own = self._together("reading its sampling options", sampling)
        return self._together("generating", lambda: self._generate_here(prompts, own, step, mode))

    def _together(self, doing: str, call: Callable[[], Value]) -> Value:
        """Result of `call`; if all ranks gather the policy for it, an error of one rank is raised on all of them."""
        if self.shares_weights and shards(self.trainer):
            return on_all_ranks(self.trainer.accelerator, doing, call)
        return call()

    def _generate_here(
        self, prompts: list[list[int]], sampling: TrainerSampling, step: int, mode: Mode
    ) -> GenerationOutput:
        """This rank's part of a generation call."""
        began_s = time.perf_counter()
        with self._policy() as model:
            gathering_s = time.perf_counter() - began_s
            compared = mode == "train" and self.baseline_every and self._train_calls % self.baseline_every == 0
            if compared:
                self._forget_prompts()
            output = self.engine.rollout(
                model,
                prompts,
                sampling.params,
                mode=mode,
                step=step,
                extra=sampling.extra,
                policy=self._audited(),
            )
            report = output.report
            if mode == "train":
                if compared:
                    report = self._with_baseline(model, prompts, sampling, output)
                self._train_calls += 1
                self._importance.observe(model, sampling.params, output)
            left_s = time.perf_counter()
        gathering_s += time.perf_counter() - left_s
        report = with_sync(report, gathering_s)
        self._reports.add(report)
        return replace(output, report=report)

    def _mode(self) -> Mode:
        """Hook: the purpose of a call, training or evaluation."""
        return "train" if self.trainer.model.training else "eval"

    def _sampling(self, seed: int) -> TrainerSampling:
        """Hook: the trainer's sampling options. Raises `ValueError` for those that the engine does not support."""
        return sampling_in_process(self.trainer, seed)

    def _policy(self) -> AbstractContextManager[Any]:
        """Hook: the policy for `RolloutEngine.rollout`, ready for one call.

        In process it is the trainer's model. Shards of DeepSpeed ZeRO-3 and FSDP are gathered once for the whole call.
        """
        return whole_policy(self.trainer)

    def _audited(self) -> nn.Module | None:
        """Hook: the policy whose plain forward the audit uses, if another copy generates.

        None audits `_policy` itself in process, and nothing with other backends.
        """
        return None

    def _forget_prompts(self) -> None:
        """Hook: make the next call run all its prompts, so that its time can be compared with another call's.

        In process every call runs them.
        """

    def _seed(self, step: int, mode: Mode) -> int:
        """A distinct seed for every generation call; a run resumed at this step gets the same one.

        The first run of a trainer has those of any other process; a further run that begins anew has others.
        """
        call = self._calls_at_step.get((step, mode), 0)
        self._calls_at_step = {(step, mode): call + 1}
        seed = int(self.trainer.args.seed)
        group = int(self.trainer.accelerator.process_index) // self.ranks_per_engine
        run = [self._runs.number] if self._runs.number else []
        for part in (step, call, int(mode == "eval"), group, *run):
            seed = mix64(seed ^ mix64(part + 1))
        return seed >> 1

    def _with_baseline(
        self, model: Any, prompts: list[list[int]], sampling: TrainerSampling, output: GenerationOutput
    ) -> StepReport:
        """Report of `output`, with the tokens/s of a rerun without speculation, whose tokens must be equal."""
        began_s = time.perf_counter()
        self._forget_prompts()
        plain = self.engine.rollout(model, prompts, sampling.params, speculation=False, extra=sampling.extra)
        measuring_s = time.perf_counter() - began_s
        self.engine.measured(measuring_s)
        self._reports.measured(measuring_s)
        report = replace(output.report, baseline_tokens_per_s=rerun_tokens_per_s(output.report, plain.report))
        if plain.completion_ids != output.completion_ids and self.engine.config.verification == "invariant":
            pairs = zip(plain.completion_ids, output.completion_ids, strict=True)
            changed = sum(a != b for a, b in pairs)
            message = (
                f"{changed} of {len(prompts)} completions differ from the rerun without speculation: expected only from "
                "near-ties between batch shapes in low precision"
            )
            report = replace(report, warnings=(*report.warnings, message))
        return report


def refuse_images(images: list[Any] | None) -> None:
    """Raise `ValueError` for prompts with images."""
    if images is not None and any(images):
        raise ValueError("prompts with images cannot be generated in process: use TRL's own engine for them")
