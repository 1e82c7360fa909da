"""The compiled commit (`atlas_rl/decode/settling.py`) in plain numpy."""

from __future__ import annotations

import numpy as np

from atlas_rl.decode.settling import Drawn, Fates, Texts


def settle_in_numpy(drawn: Drawn, texts: Texts, fates: Fates) -> tuple[float, float, int]:
    """Do what `settle` does, one array operation at a time."""
    requests, tokens = drawn.requests, drawn.token_ids
    ends = drawn.ends if len(drawn.ends) else (tokens[..., None] == drawn.stops).any(axis=-1)
    ends = ends & (np.arange(tokens.shape[1])[None] < drawn.num_tokens[:, None])
    stopped = ends.any(axis=1)
    count = np.where(stopped, ends.argmax(axis=1) + 1, drawn.num_tokens)
    count = np.minimum(count, texts.max_lengths[requests] - texts.lengths[requests])
    row, place = np.nonzero(np.arange(tokens.shape[1])[None] < count[:, None])
    texts.token_ids[requests[row], texts.lengths[requests[row]] + place] = tokens[row, place]
    if len(drawn.logprobs):
        completed = texts.lengths[requests[row]] - texts.prompt_lengths[requests[row]]
        texts.logprobs[requests[row], completed + place] = drawn.logprobs[row, place]
    texts.lengths[requests] += count
    fates.num_committed[:] = count
    fates.num_accepted[:] = np.minimum(np.minimum(drawn.num_tokens - 1, drawn.num_drafted), count)
    fates.num_drafted[:] = np.where(drawn.num_tokens > count, fates.num_accepted, drawn.num_drafted)
    fates.finished[:] = stopped | (texts.lengths[requests] >= texts.max_lengths[requests])
    entropies, max_probs = drawn.entropies[row, place], drawn.max_probs[row, place]
    return float(entropies.sum(dtype=np.float64)), float(max_probs.sum(dtype=np.float64)), int(count.sum())
