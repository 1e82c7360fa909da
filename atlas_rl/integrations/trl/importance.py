"""Switches off TRL's importance-sampling correction where it would multiply by one.

TRL corrects for an engine whose logprobs differ from the trainer's, at the price of a forward pass over every rollout. An
engine that samples from the trainer's own weights needs none of it. The first rollouts are checked before it is dropped.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atlas_rl.core import SamplingParams

if TYPE_CHECKING:
    from atlas_rl.rollout.engine import GenerationOutput

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # nats, in float32
_TOLERANCE_LOW_PRECISION = 0.1  # nats: logprobs differ by rounding between batch shapes
_CHECKED_ROWS = 2


class ImportanceCheck:
    """Compares sampled logprobs with the trainer's forward pass, once.

    Args:
        trainer: Whose `vllm_importance_sampling_correction` is switched off if they agree.
        wanted: False leaves the correction alone.
    """

    def __init__(self, trainer: Any, wanted: bool) -> None:
        self._trainer = trainer
        self._pending = wanted

    def observe(self, model: nn.Module, sampling: SamplingParams, output: GenerationOutput) -> None:
        """Check the rollouts of one training call by `model`, if no earlier ones have been.

        A truncated or penalised distribution keeps the correction: there TRL's forward pass scores another distribution.
        """
        trainer = self._trainer
        if not self._pending or not getattr(trainer, "vllm_importance_sampling_correction", False):
            return
        self._pending = False
        if not sampling.plain:
            logger.info(
                "atlas_rl: importance-sampling correction kept: the sampled distribution is truncated or penalised"
            )
            return
        difference = _logprob_difference(model, sampling, output)
        if difference <= _tolerance(model, trainer):
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


def _tolerance(model: nn.Module, trainer: Any) -> float:
    """Largest difference in nats that rounding explains."""
    exact = next(model.parameters()).dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
    return _TOLERANCE if exact else _TOLERANCE_LOW_PRECISION


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
