"""TRL trainers generate through the engine: GRPOTrainer and RLOOTrainer, in process.

The seam is the object that TRL keeps for vLLM. Trainers ask `trainer.vllm_generation` to sync weights and to generate,
whatever stands there; an adapter with the same two methods brings every feature of that path along: importance-sampling
correction, tools, environments, evaluation. The trainer is built with `use_vllm=False`, so no vLLM is ever loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import unwrap_model_for_generation

from atlas_kernels.noise import mix64
from atlas_rl.core import SamplingParams
from atlas_rl.report.report import Mode, StepReport
from atlas_rl.report.sinks import trainer_metrics
from atlas_rl.report.sums import concatenate, merge
from atlas_rl.sync.checkpoint import FILE_NAME, load_state, save_state

if TYPE_CHECKING:
    from atlas_rl.rollout.engine import AtlasRolloutEngine, GenerationOutput

logger = logging.getLogger(__name__)

_LOGPROB_TOLERANCE = {torch.float32: 1e-3}  # nats; lower precisions differ by rounding between batch shapes
_LOGPROB_TOLERANCE_LOW_PRECISION = 0.1
_CHECKED_ROWS = 2


def attach(engine: AtlasRolloutEngine, trainer: Any, baseline_every: int) -> TrainerAdapter:
    """Put the engine in the place of the trainer's vLLM. Raises `ValueError` and changes nothing if it cannot."""
    check_trainer(trainer, baseline_every)
    if getattr(trainer, "vllm_generation", None) is not None:
        raise ValueError("the trainer already generates with vLLM: build it with use_vllm=False and attach once")
    adapter = TrainerAdapter(engine, trainer, baseline_every)
    trainer.use_vllm = True
    trainer.vllm_generation = adapter
    trainer._last_loaded_step = -1
    return adapter


def check_trainer(trainer: Any, baseline_every: int) -> None:
    """Raise `ValueError` for a trainer that no engine can be attached to."""
    if baseline_every < 0:
        raise ValueError(f"baseline_every must be >= 0 (0 never), got {baseline_every}")
    if not hasattr(trainer, "_generate_single_turn") or not hasattr(trainer, "_metrics"):
        raise ValueError(
            f"{type(trainer).__name__} has no generation seam to attach to: attach to a GRPOTrainer or an RLOOTrainer, "
            "or call engine.generate() yourself"
        )
    if isinstance(getattr(trainer, "vllm_generation", None), TrainerAdapter):
        raise ValueError("the trainer already generates with this engine: attach once")
    if getattr(trainer, "rollout_func", None) is not None:
        raise ValueError("the trainer has a rollout_func, which would bypass the engine: leave it out and attach")
    if getattr(trainer, "use_transformers_continuous_batching", False):
        raise ValueError("set use_transformers_continuous_batching=False: the engine batches by itself")


def rollout_func(engine: AtlasRolloutEngine, trainer: Any) -> TrainerAdapter:
    """The adapter behind `GRPOTrainer(rollout_func=engine)`, made on its first call."""
    return TrainerAdapter(engine, trainer, baseline_every=0)


class TrainerAdapter:
    """Speaks `trl.generation.vllm_generation.VLLMGeneration` towards the trainer.

    Args:
        engine: Generates.
        trainer: Its sampling options are read at every generation, so that schedules on them work.
        baseline_every: See `AtlasRolloutEngine.attach`.

    Raises:
        ValueError: The trainer asks for sampling options that the engine does not have.
    """

    def __init__(self, engine: AtlasRolloutEngine, trainer: Any, baseline_every: int) -> None:
        self.engine = engine
        self.trainer = trainer
        self.baseline_every = baseline_every
        self._check_importance_sampling = engine.config.spare_importance_sampling
        self._calls_at_step: dict[tuple[int, str], int] = {}
        self._train_calls = 0
        self._synced_step: int | None = None
        self._sampling(seed=0)  # refuse options that cannot be honoured before the trainer is touched
        self._callback = ReportCallback(engine, trainer)
        trainer.add_callback(self._callback)

    @property
    def llm(self) -> Any:
        """`llm.llm_engine.model_config.max_model_len`, which TRL's tool loop reads: the policy's context in tokens."""
        config = self.trainer.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or 1 << 30
        return SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=limit)))

    def sync_weights(self) -> None:
        """The policy moved. Its weights are shared, so nothing is copied; the drafters are refreshed."""
        step = int(self.trainer.state.global_step)
        if self._synced_step != step:
            self._synced_step = step
            self.engine.policy_updated(step)

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """Generate one completion per prompt; the trainer has repeated each prompt `num_generations` times.

        Returns:
            prompt ids, completion ids, and of every token its logprob and id in a list of one, as TRL expects.

        Raises:
            ValueError: Prompts with images.
        """
        if images is not None and any(images):
            raise ValueError("prompts with images cannot be generated in process: use TRL's own engine for them")
        with profiler or nullcontext():
            output = self._generate(prompts)
        logprobs = [[[value] for value in row] for row in output.logprobs]
        token_ids = [[[token] for token in row] for row in output.completion_ids]
        return output.prompt_ids, output.completion_ids, logprobs, token_ids

    def rollout_func(self, prompts: list[Any]) -> dict[str, Any]:
        """TRL's `rollout_func` contract: one row per prompt, which come already repeated."""
        prompt_ids, images, _ = self.trainer._tokenize_prompts(prompts)
        if images is not None and any(images):
            raise ValueError("prompts with images cannot be generated in process: use TRL's own engine for them")
        self.sync_weights()
        output = self._generate(prompt_ids)
        return {
            "prompt_ids": output.prompt_ids,
            "completion_ids": output.completion_ids,
            "logprobs": output.logprobs,
        }

    def _generate(self, prompts: list[list[int]]) -> GenerationOutput:
        trainer, step = self.trainer, int(self.trainer.state.global_step)
        mode: Mode = "train" if trainer.model.training else "eval"
        sampling = self._sampling(self._seed(step, mode))
        with self._policy() as model:
            output = self.engine.rollout(
                model, prompts, sampling, mode=mode, step=step, extra=self._extra(), policy=self._audited()
            )
            report = output.report
            if mode == "train":
                if self.baseline_every and self._train_calls % self.baseline_every == 0:
                    report = self._with_baseline(model, prompts, sampling, output)
                self._train_calls += 1
                self._spare_importance_sampling(model, sampling, output)
        self._callback.add(report)
        return output

    def _extra(self) -> dict[str, Any]:
        """Sampling parameters that only another backend has."""
        return {}

    def _audited(self) -> Any:
        """The policy to audit against, where the backend does not run it itself."""
        return None

    @contextmanager
    def _policy(self) -> Iterator[Any]:
        """The policy with its weights in one place: DeepSpeed ZeRO-3 and FSDP shards gathered."""
        trainer = self.trainer
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            yield model

    def _sampling(self, seed: int) -> SamplingParams:
        trainer = self.trainer
        extra = dict(trainer.args.generation_kwargs or {})
        known = {field.name for field in fields(SamplingParams)} - {"seed", "max_new_tokens", "eos_token_ids"}
        unknown = sorted(set(extra) - known)
        if unknown:
            raise ValueError(f"generation_kwargs {unknown} cannot be honoured in process: it takes {sorted(known)}")
        options: dict[str, Any] = {
            "temperature": trainer.temperature,
            "top_k": max(trainer.top_k or 0, 0),
            "top_p": trainer.top_p,
            "min_p": trainer.min_p or 0.0,
            "repetition_penalty": trainer.repetition_penalty,
            **extra,
        }
        return SamplingParams(
            max_new_tokens=trainer.max_completion_length,
            eos_token_ids=tuple(trainer.eos_token_ids),
            seed=seed,
            **options,
        )

    def _seed(self, step: int, mode: str) -> int:
        """A seed of its own for every generation call, the same in a run that was resumed at this step."""
        call = self._calls_at_step.get((step, mode), 0)
        self._calls_at_step = {(step, mode): call + 1}
        seed = int(self.trainer.args.seed)
        for part in (step, call, int(mode == "eval"), self._noise_rank()):
            seed = mix64(seed ^ mix64(part + 1))
        return seed >> 1

    def _noise_rank(self) -> int:
        """Ranks that generate the same rollouts share it."""
        return int(self.trainer.accelerator.process_index)

    def _with_baseline(
        self, model: nn.Module, prompts: list[list[int]], sampling: SamplingParams, output: GenerationOutput
    ) -> StepReport:
        """The same rollouts without speculation: the measured price, and the same tokens."""
        plain = self.engine.rollout(model, prompts, sampling, speculation=False, extra=self._extra())
        report = replace(output.report, baseline_tokens_per_s=plain.report.tokens_per_s)
        if plain.completion_ids != output.completion_ids and self.engine.config.verification == "invariant":
            pairs = zip(plain.completion_ids, output.completion_ids, strict=True)
            changed = sum(a != b for a, b in pairs)
            message = (
                f"{changed} of {len(prompts)} completions differ from the rerun without speculation: expected only from "
                "near-ties between batch shapes in low precision"
            )
            report = replace(report, warnings=(*report.warnings, message))
        return report

    def _spare_importance_sampling(self, model: nn.Module, sampling: SamplingParams, output: GenerationOutput) -> None:
        """Once: are the sampled logprobs the trainer's own? Then its correction is a wasted forward; switch it off."""
        trainer = self.trainer
        if not self._check_importance_sampling or not getattr(trainer, "vllm_importance_sampling_correction", False):
            return
        self._check_importance_sampling = False
        if not sampling.plain:
            logger.info(
                "atlas_rl: importance-sampling correction kept: the sampled distribution is truncated or penalised"
            )
            return
        difference = _logprob_difference(model, sampling, output)
        dtype = next(model.parameters()).dtype
        mixed = trainer.args.bf16 or trainer.args.fp16
        tolerance = _LOGPROB_TOLERANCE_LOW_PRECISION if mixed else _LOGPROB_TOLERANCE.get(dtype, 0.1)
        if difference <= tolerance:
            trainer.vllm_importance_sampling_correction = False
            logger.warning(
                "atlas_rl: rollouts are sampled from the trainer's own weights (logprobs agree with its forward pass to "
                "%.1e nats), so the importance-sampling correction is switched off and its forward pass spared",
                difference,
            )
        else:
            logger.warning(
                "atlas_rl: importance-sampling correction kept: sampled logprobs differ from the trainer's forward pass "
                "by up to %.1e nats",
                difference,
            )


class ReportCallback(TrainerCallback):
    """Publishes one report per training step, and one per evaluation, merged over ranks.

    Figures reach the trainer's own log under `atlas/...` with the step's other metrics.
    """

    def __init__(self, engine: AtlasRolloutEngine, trainer: Any) -> None:
        self._engine = engine
        self._trainer = trainer
        self._pending: dict[Mode, list[StepReport]] = {"train": [], "eval": [], "standalone": []}
        self._step_began = time.perf_counter()
        self.leads = True
        """Whether this rank's rollouts are counted."""

    def add(self, report: StepReport) -> None:
        """A generation of the present step or evaluation."""
        self._pending[report.mode].append(report)
        if report.mode == "eval":
            # Evaluation logs before any callback hears of its end.
            self._log(report)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the first step; a resumed run gets its drafters back from the checkpoint's folder."""
        saved = self._saved_state(args, state)
        if state.global_step > 0 and saved.is_file():
            self._engine.load_state_dict(load_state(saved))
        self._step_began = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save what the drafters know beside the trainer's checkpoint."""
        if self._trainer.accelerator.is_main_process:
            save_state(self._saved_state(args, state), self._engine.state_dict())

    @staticmethod
    def _saved_state(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FILE_NAME

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publish what was generated for this optimizer step, if anything was."""
        now = time.perf_counter()
        report = self._take("train", step_s=now - self._step_began)
        self._step_began = now
        if report is not None:
            self._log(report)
            if self._trainer.accelerator.is_main_process:
                self._engine.publish(report)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publish the evaluation apart from training."""
        report = self._take("eval", step_s=None)
        self._step_began = time.perf_counter()
        if report is not None and self._trainer.accelerator.is_main_process:
            self._engine.publish(report)

    def _take(self, mode: Mode, step_s: float | None) -> StepReport | None:
        reports, self._pending[mode] = self._pending[mode], []
        if not reports:
            return None
        own = replace(concatenate(reports), step_s=step_s)
        if self._trainer.accelerator.num_processes == 1:
            return own
        # Ranks that generate the same rollouts count once.
        return merge(gather_object([own] if self.leads else []))

    def _log(self, report: StepReport) -> None:
        for name, value in trainer_metrics(report).items():
            self._trainer._metrics["eval" if report.mode == "eval" else "train"][name].append(value)


def _logprob_difference(model: nn.Module, sampling: SamplingParams, output: GenerationOutput) -> float:
    """Largest difference in nats between the sampled logprobs and a plain forward's, over the shortest rollouts."""
    order = sorted(range(len(output.completion_ids)), key=lambda row: len(output.completion_ids[row]))
    worst = 0.0
    for row in order[:_CHECKED_ROWS]:
        prompt, completion = output.prompt_ids[row], output.completion_ids[row]
        input_ids = torch.tensor([[*prompt, *completion]], device=next(model.parameters()).device)
        with torch.no_grad():
            logits = model(input_ids=input_ids).logits[0, len(prompt) - 1 : -1].float()
        logprobs = (logits / sampling.temperature).log_softmax(dim=-1)
        own = logprobs.gather(1, input_ids[0, len(prompt) :, None])[:, 0].cpu()
        worst = max(worst, (own - torch.tensor(output.logprobs[row])).abs().max().item())
    return worst
