"""Engines on a tiny policy, and what they give without speculation: the reference of the engine tests."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import Draft
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.drafters import Parrot, RandomDrafter, Stateless, TrimByDrawnToken
from tests.models import tiny_llama

VOCAB, CONTEXT = 64, 128
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4, 11, 2, 9, 5, 6], [5, 9, 2], [0, 63]]
SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.4},
    "everything": {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.8},
}
EOS = [17, 40, 35]
MAX_NEW = 18


@cache
def policy():
    return tiny_llama(seed=11)


@cache
def draft_model():
    return tiny_llama(layers=1, seed=12)


def engine_of(model=None, **options):
    return AtlasRolloutEngine(model=model or policy(), console=False, **options)


def fixed(speculator, k, controller=FixedController):
    """An engine whose only speculator drafts `k` tokens on every step."""
    return engine_of(speculators=[speculator], controller=controller([speculator.name], speculator.name, k))


def generate(engine, prompts=PROMPTS, **options):
    return engine.generate(
        prompts, **({"max_new_tokens": MAX_NEW, "eos_token_ids": EOS, "seed": 3, "num_generations": 2} | options)
    )


@cache
def reference(name="plain"):
    """What the engine gives without speculation."""
    output = generate(engine_of(speculation=False), **SETTINGS[name])
    assert len({tuple(row) for row in output.completion_ids}) > 5
    assert len({len(row) for row in output.completion_ids}) > 1  # some stop early, some do not
    return output


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [name for name, module in model.named_modules() if "forward" in module.__dict__],
        model.config.to_dict(),
        model.config._attn_implementation,
        torch.is_grad_enabled(),
    )


def processed_logprobs(model, prompt, completion, options):
    """Log-softmax of the processed logits at every completion token, by transformers' own means: `[tokens, vocab]`."""
    tokens = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        processors.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    rows = [processors(tokens[:, :n], logits[None, n - 1]) for n in range(len(prompt), len(prompt) + len(completion))]
    return torch.cat(rows).log_softmax(-1)


def parrot(error_rate):
    return Parrot(reference().completion_ids, error_rate=error_rate)


ARMS = {
    **{f"random, k={k}": (lambda k=k: fixed(RandomDrafter(), k)) for k in (1, 5)},
    **{f"parrot, 30% wrong, k={k}": (lambda k=k: fixed(parrot(0.3), k)) for k in (1, 2, 3, 5, 8)},
    **{f"parrot, {rate:.0%} wrong, k=5": (lambda rate=rate: fixed(parrot(rate), 5)) for rate in (0, 0.1, 0.6, 1)},
    **{f"draft LM, k={k}": (lambda k=k: fixed(DraftLM(draft_model(), VOCAB), k)) for k in (1, 3, 8)},
    "draft LM that is the policy": lambda: fixed(DraftLM(policy(), VOCAB), 4),
    "history, k=5": lambda: fixed(HistorySpeculator(), 5),
    "trimmed by the drawn token": lambda: fixed(RandomDrafter(), 5, TrimByDrawnToken),
    "trimmed parrot": lambda: fixed(parrot(0.2), 8, TrimByDrawnToken),
    "controller, history": lambda: engine_of(),
    "controller, history and draft LM": lambda: engine_of(draft_model=draft_model()),
    "controller, random": lambda: engine_of(speculators=[RandomDrafter()]),
    "controller, parrot": lambda: engine_of(speculators=[parrot(0.1)]),
    "controller, four": lambda: engine_of(
        speculators=[
            RandomDrafter(),
            parrot(0.1),
            HistorySpeculator(),
            DraftLM(draft_model(), VOCAB),
        ]
    ),
}


class Mute(Stateless):
    """Has nothing to say."""

    name = "mute"

    def propose(self, sequences, requests, max_draft_tokens):
        return Draft.empty(len(requests))


def tokenizer(words="w", eos=0):
    own = {f"{words}{i}": i for i in range(VOCAB)}
    model = Tokenizer(WordLevel(own, unk_token=f"{words}0"))
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=f"{words}{eos}", unk_token=f"{words}0")
