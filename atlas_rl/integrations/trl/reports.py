"""Publishes the engine's report of every training step."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas_rl.integrations.trl.together import of_all_ranks
from atlas_rl.report.report import Mode, StepReport
from atlas_rl.report.sinks import trainer_metrics
from atlas_rl.report.sums import concatenate, merge

if TYPE_CHECKING:
    from atlas_rl.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)


class ReportCallback(TrainerCallback):
    """Publishes one report per training step and one per evaluation, merged over ranks.

    Figures reach the trainer's own log under `atlas/...`, beside the step's other metrics.

    Args:
        engine: Publishes the reports.
        trainer: Its log gets the figures.
    """

    def __init__(self, engine: RolloutEngine, trainer: Any) -> None:
        self._engine = engine
        self._trainer = trainer
        self._pending: dict[Mode, list[StepReport]] = {"train": [], "eval": [], "standalone": []}
        self._evaluation: StepReport | None = None  # accumulated so far, over all ranks
        self._step_began = time.perf_counter()
        self._since_report_s = 0.0  # optimizer steps that have ended since the last report
        self._cycle_is_whole = not _shares_rollouts(trainer)  # whether those steps are all that a generation serves
        self._generated = False
        self.leads = True
        """Whether this rank's rollouts are counted. Ranks that generate the same rollouts count once."""
        self.may_pause = False
        """Whether the trainer has steps without rollouts, so that a first one is no sign of a trainer that bypasses us."""

    def follow(self) -> None:
        """From now on, an evaluation or prediction that raises is no part of the next one."""
        for name in ("evaluate", "predict"):
            setattr(self._trainer, name, self._apart(getattr(self._trainer, name)))

    def add(self, report: StepReport) -> None:
        """Add the report of one generation call of the present step or evaluation."""
        self._pending[report.mode].append(report)
        self._generated = True

    def measured(self, seconds: float) -> None:
        """Exclude the seconds of a measuring rerun from the training step's time."""
        self._step_began += seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the first step. An earlier run may have been interrupted in a step, which has no report."""
        self._step_began, self._generated = time.perf_counter(), False
        self._since_report_s, self._cycle_is_whole = 0.0, not _shares_rollouts(self._trainer)
        self._pending["train"] = []
        self._forget_evaluation()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publish the report of this optimizer step, if anything was generated.

        Its seconds include those of the steps since the last report: they used the rollouts of that one, as later steps
        will use these. So generation is compared with all the training that it serves.
        """
        now = time.perf_counter()
        self._since_report_s += now - self._step_began
        self._step_began = now
        report = self._take("train", step_s=self._since_report_s if self._cycle_is_whole else None)
        if not self._generated and not self.may_pause:
            self._generated = True  # warn once
            logger.warning(
                "atlas_rl: %s made its first training step without asking the engine for rollouts: it generates in code "
                "of its own",
                type(self._trainer).__name__,
            )
        if report is not None:
            self._since_report_s, self._cycle_is_whole = 0.0, True
            for name, value in trainer_metrics(report).items():
                self._trainer._metrics["train"][name].append(value)
            if self._trainer.accelerator.is_main_process:
                self._engine.publish(report)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the evaluation so far: TRL logs it before callbacks are told of its end."""
        report = self._take("eval", step_s=None)
        if report is None:
            return
        self._evaluation = report if self._evaluation is None else concatenate([self._evaluation, report])
        # One value per figure: the trainer's log averages several, which is wrong for counts and rates.
        self._trainer._metrics["eval"].update(
            {name: [value] for name, value in trainer_metrics(self._evaluation).items()}
        )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publish the evaluation's report. The interrupted training step does not count its time."""
        self.on_prediction_step(args, state, control)  # a custom evaluation loop may not report its batches
        report, self._evaluation = self._evaluation, None
        self._step_began = time.perf_counter()
        if report is not None and self._trainer.accelerator.is_main_process:
            self._engine.publish(report)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Publish the report of a prediction, like that of an evaluation."""
        self.on_evaluate(args, state, control)

    def _apart(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def alone(*args: Any, **kwargs: Any) -> Any:
            self._forget_evaluation()
            try:
                return run(*args, **kwargs)
            finally:
                self._forget_evaluation()

        return alone

    def _forget_evaluation(self) -> None:
        self._pending["eval"], self._evaluation = [], None

    def _take(self, mode: Mode, step_s: float | None) -> StepReport | None:
        """Merge all ranks' pending reports into one; None if there are none. Every rank must call this."""
        reports, self._pending[mode] = self._pending[mode], []

        def own() -> list[StepReport]:
            return [replace(concatenate(reports), step_s=step_s)] if reports and self.leads else []

        everyone = of_all_ranks(self._trainer.accelerator, "reporting its rollouts", own)
        merged = [report for rank in everyone for report in rank]
        return merge(merged) if merged else None


def _shares_rollouts(trainer: Any) -> bool:
    """Whether several optimizer steps use the rollouts of one generation."""
    args = trainer.args
    batches = getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps
    return batches * getattr(args, "num_iterations", 1) > args.gradient_accumulation_steps
