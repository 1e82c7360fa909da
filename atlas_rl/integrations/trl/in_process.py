"""Attaches an engine that generates in process, depending on how the trainer samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atlas_rl.integrations.trl.adapter import (
    TrainerAdapter,
    check_attached_once,
    check_same_policy,
    sampling_in_process,
)
from atlas_rl.integrations.trl.checks import check_gathering, check_policy_in_process, check_trainer, is_whole
from atlas_rl.integrations.trl.generate import GenerateAdapter
from atlas_rl.integrations.trl.generate_call import check_generate, read_sampling
from atlas_rl.integrations.trl.kinds import kind_of
from atlas_rl.integrations.trl.together import while_attaching

if TYPE_CHECKING:
    from atlas_rl.core import SamplingParams
    from atlas_rl.rollout.engine import RolloutEngine


def attach(engine: RolloutEngine, trainer: Any, baseline_every: int) -> TrainerAdapter:
    """Put the engine where the trainer generates. If it cannot, raises `ValueError` and changes nothing."""
    while_attaching(trainer, lambda: _check(engine, trainer, baseline_every))
    adapter_class = GenerateAdapter if kind_of(trainer).calls_the_policy else TrainerAdapter
    adapter = adapter_class(engine, trainer, baseline_every)
    adapter.install()
    return adapter


def _check(engine: RolloutEngine, trainer: Any, baseline_every: int) -> None:
    """Raise `ValueError` if the engine cannot be attached; make its drafters if this rank has the whole policy."""
    check_attached_once(engine, trainer)
    check_trainer(trainer, baseline_every, in_process=True)
    if getattr(trainer, "use_vllm", False):
        raise ValueError("the trainer already generates with vLLM: build it with use_vllm=False and attach once")
    check_same_policy(engine, trainer)
    check_gathering(trainer)
    calls_the_policy = kind_of(trainer).calls_the_policy
    sampling = _checked_config(trainer) if calls_the_policy else sampling_in_process(trainer, seed=0).params
    check_policy_in_process(trainer, sampling)
    if is_whole(trainer):
        engine.meet(trainer.model)


def _checked_config(trainer: Any) -> SamplingParams:
    """The sampling options of the trainer's calls. Raises `ValueError` for unsupported ones."""
    check_generate(trainer.model)
    try:
        return read_sampling(trainer.model, trainer.generation_config)
    except ValueError as reason:
        raise ValueError(
            f"{type(trainer).__name__} cannot generate in process: {reason}. Set it to None, or attach nothing"
        ) from reason
