"""Lets trainers that call `model.generate` generate with the engine.

They call it on the policy without its parallel wrappers, so the policy's `generate` is replaced while the trainer
trains, evaluates or predicts. Calls are read as transformers reads them. Unsupported calls are passed on to
transformers.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

from atlas_rl.integrations.trl.adapter import TrainerAdapter
from atlas_rl.integrations.trl.generate_call import check_generate, read_call, read_sampling
from atlas_rl.integrations.trl.sampling import TrainerSampling
from atlas_rl.report.report import Mode

if TYPE_CHECKING:
    from atlas_rl.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)

_ENTRANCES: dict[str, Mode] = {"train": "train", "evaluate": "eval", "predict": "eval"}
"""The methods that run a trainer, and what is generated in them. Whether the policy is in training mode says less: GKD
generates before its first step has put it there."""


class GenerateAdapter(TrainerAdapter):
    """Answers the trainer's calls of `model.generate`.

    Args:
        engine: Generates.
        trainer: Trainer whose policy's `generate` is replaced.
        baseline_every: See `AtlasRolloutEngine.attach`.

    Raises:
        ValueError: The trainer's `generation_config` asks for an option that the engine does not have.
    """

    def __init__(self, engine: RolloutEngine, trainer: Any, baseline_every: int) -> None:
        if not hasattr(trainer, "_metrics"):
            _keep_figures(trainer)
        super().__init__(engine, trainer, baseline_every)
        self._told: set[str] = set()
        self._modes: list[Mode] = []

    def install(self) -> None:
        """Replace the policy's `generate` while the trainer runs."""
        self.trainer.atlas_adapter = self
        for name, mode in _ENTRANCES.items():
            setattr(self.trainer, name, self._while_serving(getattr(self.trainer, name), mode))

    def _sampling(self, seed: int) -> TrainerSampling:
        params = read_sampling(self.trainer.model, self.trainer.generation_config)
        return TrainerSampling(params, {})

    def _mode(self) -> Mode:
        return self._modes[-1]

    def _while_serving(self, run: Any, mode: Mode) -> Any:
        @functools.wraps(run)
        def served(*args: Any, **kwargs: Any) -> Any:
            # An evaluation during training finds `generate` replaced already.
            with nullcontext() if self._modes else self._served_policy():
                self._modes.append(mode)
                try:
                    return run(*args, **kwargs)
                finally:
                    self._modes.pop()

        return served

    @contextmanager
    def _served_policy(self) -> Iterator[None]:
        """Context in which `generate` of the trainer's policy calls the engine. A copy of the policy keeps its own."""
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        check_generate(policy)

        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            plain = functools.partial(type(model).generate, model)
            return plain(*args, **kwargs) if model is not policy else self._answer(model, plain, args, kwargs)

        policy.generate = MethodType(generate, policy)  # a method, so that a copy of the policy binds it to the copy
        try:
            yield
        finally:
            del policy.generate

    def _answer(self, model: Any, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            call = read_call(model, args, kwargs)
        except ValueError as reason:
            self._tell(str(reason))
            return plain(*args, **kwargs)
        self.sync_weights()
        output = self._generate(call.prompts, call.params)
        return call.answer(output.completion_ids)

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._reports.may_pause = True  # this warning says more
            logger.warning(
                "atlas_rl: a call of model.generate is left to transformers, without speculation or report, because %s",
                reason,
            )


def _keep_figures(trainer: Any) -> None:
    """Give a trainer without metrics a place for them; its log takes their means, as in TRL's other trainers."""
    kept: dict[str, defaultdict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
    log = trainer.log

    @functools.wraps(log)
    def with_figures(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "train" if trainer.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        means = {f"{prefix}{name}": sum(values) / len(values) for name, values in kept[mode].items()}
        kept[mode].clear()
        log({**logs, **means}, *args, **kwargs)

    trainer._metrics, trainer.log = kept, with_figures
