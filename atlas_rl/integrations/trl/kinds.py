"""TRL's trainers, by how they obtain completions.

A trainer is recognised by the names of its classes, so that subclasses count as their base and no trainer is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Way = tuple[str, ...]
"""Methods of a trainer, each of which calls the next one. The last name is what stands for the engine."""

_TURN: Way = ("_generate_and_score_completions", "_generate", "_generate_single_turn", "vllm_generation")
_SELF_DISTILLATION = ("sample_rollouts", "_generate")


@dataclass(frozen=True, slots=True)
class Kind:
    """How the trainers of one class sample.

    Attributes:
        in_process: The trainer's path to the engine in process: to `vllm_generation` or to the policy's `generate`.
        vllm: Its path to a colocated vLLM; None if it does not use TRL's `VLLMGeneration`.
        built_later: Whether the vLLM engine can be added to a trainer that was built with `use_vllm=False`.
        scores_as_built: Whether it goes on scoring at the temperature that it was built with if `trainer.temperature`
            changes: TRL's fused head keeps that temperature.
    """

    in_process: Way
    vllm: Way | None = None
    built_later: bool = False
    scores_as_built: bool = False

    @property
    def calls_the_policy(self) -> bool:
        """Whether the trainer calls `model.generate` in process."""
        return self.in_process[-1] == "generate"


_ASKS_VLLM = Kind(_TURN, _TURN, built_later=True)
_SCORES_BY_FUSED_HEAD = replace(_ASKS_VLLM, scores_as_built=True)
_DISTILLS_ITSELF = Kind(
    (*_SELF_DISTILLATION, "_generate_transformers", "generate"),
    (*_SELF_DISTILLATION, "_generate_vllm", "vllm_generation"),
)
_KINDS = {
    "GRPOTrainer": _SCORES_BY_FUSED_HEAD,
    "RLOOTrainer": _SCORES_BY_FUSED_HEAD,
    "DistillationTrainer": _ASKS_VLLM,
    "SDFTTrainer": _DISTILLS_ITSELF,
    "SDPOTrainer": _DISTILLS_ITSELF,
    "GOLDTrainer": Kind(
        (
            "_fill_buffer",
            "_generate_on_policy_for_slices",
            "_generate_non_vllm_for_slices",
            "generate_on_policy_outputs",
            "generate",
        ),
        ("_fill_buffer", "_generate_on_policy_for_slices", "vllm_generation"),
    ),
    "IWOPDTrainer": Kind(
        ("_fill_buffer", "_generate_student_completions", "_generate_with_model", "generate"),
        ("_fill_buffer", "_generate_student_completions", "vllm_generation"),
    ),
    "OnlineDPOTrainer": Kind(("training_step", "_generate", "generate")),
    "GKDTrainer": Kind(("training_step", "generate_on_policy_outputs", "generate")),
    "A2POTrainer": Kind(("_prepare_inputs", "generate")),
}
_NEVER = "never samples: it trains on the completions of its dataset, and there is nothing to generate"
_IN_EVALUATION = "samples only to log completions (generate_during_eval), never for training"
_ELSEWHERE = (
    "generates in a vLLM server, by a client of its own: nothing can be attached. `atlas-rl vllm-serve` starts a server "
    "that drafts (docs/scaling.md)"
)
_NOT_SERVED = {
    **dict.fromkeys(("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "TPOTrainer"), _NEVER),
    **dict.fromkeys(("CPOTrainer", "ORPOTrainer"), _IN_EVALUATION),
    **dict.fromkeys(("AsyncGRPOTrainer", "AsyncDistillationTrainer"), _ELSEWHERE),
}
_STAND_ALONE = "use AtlasRolloutEngine(model=policy, tokenizer=...).generate(...)"


def kind_of(trainer: Any) -> Kind:
    """How a trainer samples.

    Raises:
        ValueError: It is not a trainer, never samples, or samples where no engine can be attached; the message says
            which.
    """
    if not isinstance(trainer, type):
        for owner in type(trainer).__mro__:
            of_trl = owner.__module__.partition(".")[0] == "trl"
            if of_trl and owner.__name__ in _KINDS:
                return _KINDS[owner.__name__]
            if of_trl and owner.__name__ in _NOT_SERVED:
                derived = "" if owner is type(trainer) else f" derives from {owner.__name__}, which"
                raise ValueError(
                    f"{type(trainer).__name__}{derived} {_NOT_SERVED[owner.__name__]}. For prompts of your own "
                    f"{_STAND_ALONE}"
                )
        if hasattr(trainer, "_generate_single_turn") and hasattr(trainer, "_metrics"):
            return _ASKS_VLLM
    got = f"the class {trainer.__name__}" if isinstance(trainer, type) else f"a {type(trainer).__name__}"
    raise ValueError(
        f"attach() takes an initialised TRL trainer that samples ({', '.join(_KINDS)}) or a subclass, got {got}. "
        f"For a policy, or for another trainer, {_STAND_ALONE}"
    )
