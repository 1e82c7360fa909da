"""Switches off TRL's importance-sampling correction where it would multiply by one.

TRL corrects for an engine whose logprobs differ from the trainer's, at the price of a forward pass over every rollout.
An engine with the trainer's own weights needs no correction if it samples from the distribution that the trainer scores
with: the whole softmax at the temperature it scores at, in its precision and with its dropout. Sampling options are
compared before every training generation. Logprobs are compared once, over enough tokens, before the correction is
dropped. Suppressed tokens do not count as a difference: if they have a probability, the comparison of logprobs finds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas_rl.audit.plain_forward import plain_logits
from atlas_rl.audit.scores import FULL_PRECISION, LOW_PRECISION
from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl.together import of_all_ranks
from atlas_rl.policy.sharded import rounds_in_training
from atlas_rl.policy.unwrap import unwrap_policy

if TYPE_CHECKING:
    from atlas_rl.rollout.output import GenerationOutput

logger = logging.getLogger(__name__)

_ENOUGH_TOKENS = 32  # summed over ranks
_ROWS = 16  # most rollouts compared per generation
_POSITIONS = 1024  # most compared positions of a rollout
_CHUNK = 64  # positions whose float32 logits are held together
_OUTLIER = 10  # limit of the largest difference, as a multiple of the limit of the mean


@dataclass(slots=True)
class LogprobComparison:
    """One rank's comparison of sampled logprobs with the trainer's.

    Attributes:
        num_tokens: Tokens compared.
        sum_nats: Sum of the absolute differences.
        max_nats: The largest one.
        limit_nats: Mean absolute difference that rounding explains.
        reason: Why the two distributions differ; empty if they should be equal.
    """

    num_tokens: int = 0
    sum_nats: float = 0.0
    max_nats: float = 0.0
    limit_nats: float = 0.0
    reason: str = ""

    @property
    def mean_nats(self) -> float:
        """Mean absolute difference; 0 before any token was compared."""
        return self.sum_nats / max(1, self.num_tokens)

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the differences; NaN does not agree."""
        small = self.mean_nats <= self.limit_nats and self.max_nats <= _OUTLIER * self.limit_nats
        return not self.reason and (small or not self.num_tokens)


class ImportanceCheck(TrainerCallback):
    """Compares sampled logprobs with the trainer's forward pass, and drops the correction if they agree.

    Ranks decide together, at the beginning and the end of an optimizer step, which each of them reaches equally often.
    Ranks that decided differently would run different collectives and deadlock.

    Args:
        trainer: Trainer whose `vllm_importance_sampling_correction` is switched off if they agree.
        wanted: False leaves the correction as it is.
        built_at: Temperature at which the trainer scores, whatever `trainer.temperature` is now (`Kind.scores_as_built`);
            None if it scores at `trainer.temperature`.
    """

    def __init__(self, trainer: Any, wanted: bool, built_at: float | None = None) -> None:
        self._trainer, self._built_at = trainer, built_at
        self._told = False
        self._pending = wanted and bool(getattr(trainer, "vllm_importance_sampling_correction", False))
        self._dropped = False
        self._own = LogprobComparison()

    def begin_step(self, read: Callable[[], SamplingParams]) -> None:
        """Switch the correction on again if options changed; `read` reads the trainer's sampling options, and may raise.

        Called before the first training rollouts of a policy version. Not before those of an evaluation: the trainer may
        go on with training rollouts that were made without correction, and lack what its loss then reads.
        """
        if not self._dropped:
            return
        reasons = of_all_ranks(
            self._trainer.accelerator, "reading its sampling options", lambda: self._difference_in_law(read())
        )
        reason = next(filter(None, reasons), "")
        if reason:
            self._dropped, self._trainer.vllm_importance_sampling_correction = False, True
            logger.warning("atlas_rl: importance-sampling correction switched on again: %s", reason)

    def observe(self, model: nn.Module, sampling: SamplingParams, output: GenerationOutput) -> None:
        """Compare the rollouts of one training call by `model`, until there are enough of them.

        Raises:
            ValueError: Sampling options have changed since the step began, and the correction is off.
        """
        if self._dropped:
            if self._trainer.accelerator.num_processes == 1:
                self.begin_step(lambda: sampling)
            elif reason := self._difference_in_law(sampling):
                raise ValueError(
                    f"{reason}: this changed between two generation calls of one policy version, where ranks cannot decide "
                    "together to correct for it. Change sampling options at the end of a step (on_step_end), or give the "
                    "engine spare_importance_sampling=False"
                )
            return
        self.warn_uncorrected(sampling)
        if not self._pending or not self._trainer.use_vllm or self._own.num_tokens >= _ENOUGH_TOKENS:
            return
        self._own.reason = self._own.reason or self._difference_in_law(sampling) or self._difference_in_weights()
        if not self._own.reason:
            self._compare(model, sampling, output)
        if self._trainer.accelerator.num_processes == 1:
            self._settle([self._own])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide over all ranks together, by the worst of them."""
        if self._pending and self._trainer.use_vllm and self._trainer.accelerator.num_processes > 1:
            self._settle(of_all_ranks(self._trainer.accelerator, "comparing logprobs", lambda: self._own))

    def warn_uncorrected(self, sampling: SamplingParams) -> None:
        """Warn once if training rollouts have another temperature than the trainer scores at, and nothing corrects it."""
        if self._told or self._built_at is None or sampling.temperature == self._built_at:
            return
        if self._trainer.use_vllm and getattr(self._trainer, "vllm_importance_sampling_correction", False):
            return
        self._told = True
        if self._trainer.accelerator.is_main_process:
            logger.warning(
                "atlas_rl: rollouts are sampled at temperature %g, and scored at %g, with which %s was built; nothing "
                "corrects for the difference, so its gradient is biased. Build it with the temperature to sample at. Only "
                "an attached GRPOTrainer with vllm_importance_sampling_correction=True takes another one",
                sampling.temperature,
                self._built_at,
                type(self._trainer).__name__,
            )

    @property
    def _scored_at(self) -> float:
        """Temperature at which the trainer scores."""
        return float(getattr(self._trainer, "temperature", 1.0)) if self._built_at is None else self._built_at

    def _difference_in_law(self, sampling: SamplingParams) -> str:
        """Why the trainer scores another distribution than the sampled one, in words; empty if it is the same."""
        if not sampling.plain:
            return "the sampled distribution is greedy, truncated or penalised, and the trainer scores the whole one"
        if sampling.temperature != self._scored_at:
            return f"rollouts are sampled at temperature {sampling.temperature:g}, and scored at {self._scored_at:g}"
        return ""

    def _difference_in_weights(self) -> str:
        if rounds_in_training(self._trainer.model_wrapped):
            return "rollouts are sampled with the weights that FSDP1 keeps, and scored with what its mixed precision rounds"
        return ""

    def _compare(self, model: nn.Module, sampling: SamplingParams, output: GenerationOutput) -> None:
        """Add some randomly chosen rollouts, scored in the trainer's mode and precision."""
        device = unwrap_policy(model).get_input_embeddings().weight.device
        rows = np.random.default_rng(sampling.seed).permutation(len(output.completion_ids))[:_ROWS]
        # Dropout in this pass must not change the random numbers of training.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            self._trainer.accelerator.autocast(),
        ):
            for row in rows.tolist():
                prompt, completion = output.prompt_ids[row], output.completion_ids[row]
                self._compare_row(model, prompt, completion, output.logprobs[row], self._scored_at, device)

    def _compare_row(
        self,
        model: nn.Module,
        prompt: list[int],
        completion: list[int],
        logprobs: list[float],
        temperature: float,
        device: torch.device,
    ) -> None:
        kept = torch.arange(0, len(completion), max(1, len(completion) // _POSITIONS), device="cpu")
        if not len(kept):
            return
        tokens = torch.tensor([*prompt, *completion], device=device)
        plain = plain_logits(model, tokens[:-1], (kept + len(prompt) - 1).to(device))
        limit = (FULL_PRECISION if plain.full_precision else LOW_PRECISION).at(temperature).logprob_nats
        own = self._own
        own.limit_nats = max(own.limit_nats, limit)
        returned = torch.tensor(logprobs, dtype=torch.float64, device="cpu")[kept]
        for begin in range(0, len(kept), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            scored = (plain.logits[part].float() / temperature).log_softmax(dim=-1)
            drawn = tokens[len(prompt) :][kept[part].to(device)]
            error = (scored.gather(1, drawn[:, None])[:, 0].double().cpu() - returned[part]).abs()
            own.num_tokens += len(error)
            own.sum_nats += float(error.sum())
            own.max_nats = float(np.maximum(own.max_nats, float(error.max())))  # keeps NaN

    def _settle(self, ranks: list[LogprobComparison]) -> None:
        """Decide if the ranks together have seen enough; called with the same argument on every rank."""
        reason = next((rank.reason for rank in ranks if rank.reason), "")
        if not reason and sum(rank.num_tokens for rank in ranks) < _ENOUGH_TOKENS:
            return
        self._pending = False
        worst = max(ranks, key=lambda rank: (not rank.agrees, rank.mean_nats))
        if all(rank.agrees for rank in ranks):
            self._dropped, self._trainer.vllm_importance_sampling_correction = True, False
            message = (
                "rollouts are sampled from the trainer's own weights (logprobs agree with its forward pass to "
                f"{worst.max_nats:.1e} nats): the importance-sampling correction is switched off and its forward pass spared"
            )
        else:
            reason = reason or (
                f"sampled logprobs differ from the trainer's forward pass by {worst.mean_nats:.1e} nats on average, "
                f"{worst.max_nats:.1e} at most"
            )
            message = f"importance-sampling correction kept: {reason}"
        if self._trainer.accelerator.is_main_process:
            logger.warning("atlas_rl: %s", message)
