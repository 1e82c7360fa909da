"""Greedy tokens of the engine, and those of plain forwards."""

from __future__ import annotations

import torch

from atlas_rl import AtlasRolloutEngine

PROMPTS = [[5, 9, 2], list(range(3, 20)), [7]]


def generate(model, prompts=PROMPTS, max_new_tokens=12, speculation=False, **options):
    """Completions of one call."""
    engine = AtlasRolloutEngine(model=model, console=False, speculation=speculation, **options)
    output = engine.generate(prompts, max_new_tokens=max_new_tokens, temperature=0.0, eos_token_ids=[], seed=0)
    return output.completion_ids


def plain(model, prompts=PROMPTS, max_new_tokens=12):
    """Each token from a plain forward over the whole text before it."""
    completions = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(max_new_tokens):
            with torch.no_grad():
                text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        completions.append(text[len(prompt) :])
    return completions
