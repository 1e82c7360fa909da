"""Engines of every arm on a policy that is moved to a device, pretended or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.rollout.output import GenerationOutput
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.config import Eagle3Config
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.drafters import recurrent_drafter
from tests.models import tiny_bigram

Move = Callable[[torch.nn.Module], Any]

VOCAB, PROMPTS, DEPTH = 128, [[5, 9, 2, 7, 7, 1], [3, 8, 1], [9]], 3
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8},
    "truncated": {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalty": {"temperature": 0.8, "repetition_penalty": 1.3},
}


def policy(dtype: torch.dtype = torch.float32) -> Any:
    """Two layers whose next token depends on the last one more than on all others."""
    return tiny_bigram(vocab=VOCAB, context=128, seed=2).to(dtype)


class _Waiting(torch.nn.Module):
    """An activation that looks at its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) == 12345.0 else torch.nn.functional.silu(x)


def waits(model: Any) -> Any:
    """The policy with layers that wait for the device, which cannot be captured."""
    for layer in model.model.layers:
        layer.mlp.act_fn = _Waiting()
    return model


def autocast(model: Any) -> Any:
    """The policy as TRL trains it: float32 weights, computed with in bfloat16."""
    model.forward = torch.autocast("cuda" if torch.cuda.device_count() else "cpu", torch.bfloat16)(model.forward)
    return model


def draft_lm() -> Any:
    """One layer, likewise."""
    return tiny_bigram(vocab=VOCAB, context=128, layers=1, seed=2)


def eagle3_head() -> Eagle3Head:
    """An untrained head over a quarter of the vocabulary."""
    torch.manual_seed(0)
    layer = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    head = Eagle3Head(Eagle3Config(layer, VOCAB // 4, (0, 1)))
    head.set_vocabulary(torch.arange(0, VOCAB, 4))
    return head.eval()


ARMS: dict[str, Callable[[Move], Speculator | None]] = {
    "plain": lambda move: None,
    "history": lambda move: HistorySpeculator(),
    "recurrent": lambda move: recurrent_drafter(budget_share=1e-5),  # one step of training in all
    "eagle3": lambda move: Eagle3Speculator(move(eagle3_head())),
    "draft_lm": lambda move: DraftLM(move(draft_lm()), VOCAB),
    "fp4_self": lambda move: Fp4SelfSpeculator(),
}


def engine_of(model: Any, speculator: Speculator | None = None, **options: Any) -> AtlasRolloutEngine:
    """An engine whose only speculator drafts `DEPTH` tokens in every step; without one it decodes plainly."""
    if speculator is None:
        options |= {"speculation": False}
    else:
        controller = FixedController([speculator.name], speculator.name, DEPTH)
        options |= {"speculators": [speculator], "controller": controller}
    return AtlasRolloutEngine(model=model, console=False, **{"audit_share": 0.0} | options)


def generate(engine: AtlasRolloutEngine, calls: int = 1, **options: Any) -> list[GenerationOutput]:
    """Calls with a policy update after each; no drafter may have failed."""
    usual = {"num_generations": 2, "max_new_tokens": 10, "eos_token_ids": [17], "temperature": 0.8}
    outputs = []
    for call in range(calls):
        outputs.append(engine.generate(PROMPTS, **usual | {"seed": call} | options))
        engine.policy_updated()
    assert not any(output.report.drafter_faults for output in outputs), outputs[-1].report.warnings
    return outputs


def calls_before_drafts(arm: str) -> int:
    """Calls after which an arm drafts: a recurrent head has to learn first, an index to be filled."""
    return 1 if arm in ("history", "recurrent") else 0


def tokens_of(outputs: list[GenerationOutput]) -> list[list[list[int]]]:
    """Completions of every call."""
    return [output.completion_ids for output in outputs]


def num_drafted(outputs: list[GenerationOutput]) -> int:
    """Draft tokens that were verified."""
    return sum(sum(output.report.drafted.values()) for output in outputs)
