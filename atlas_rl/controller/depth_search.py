"""Searches how far to ask a drafter and for which requests, compiled.

A decision weighs some twenty answers, each a ranking of all draft slots of the batch. In numpy that took 4% of a step.
"""

from __future__ import annotations

import numpy as np

from atlas_kernels.jit_cache import cached_njit

_LEVELS = 64  # resolution of the ranking by survival: drafts that do not exist yet need no finer one


@cached_njit(nogil=True)
def search(current, expected, better, forward_s, draft_s, depths, discount):
    """Find the answer with the highest expected goodput.

    Args:
        current: float64 `[batch, lookahead]`, survival of the draft that each request already has; rows never rise.
        expected: float64 `[draws, batch, lookahead]`, survival of possible drafts of the drafter. Each draw is verified
            as far as is best for it; an answer's goodput is that of all draws together.
        better: bool `[batch]`, requests where the drafter is expected to beat the current draft.
        forward_s: float64 `[n]`, seconds of a forward over 0, 1, ... tokens, to at least `batch * (1 + lookahead)`.
        draft_s: float64 `[3, num_depths]`, draft seconds of the step: if it is not asked (first entry of the row), if
            it is asked for `better` to each depth, if it is asked for all requests.
        depths: int64 `[num_depths]`, draft tokens that may be asked for.
        discount: Factor on the goodput of steps with drafts.

    Returns:
        Requests to ask for (0 none, 1 `better`, 2 all), index of the depth, and the expected goodput without the
        discount.
    """
    draws, batch, lookahead = expected.shape
    sums = np.zeros(batch)
    for row in range(batch):
        for position in range(lookahead):
            sums[row] += current[row, position]
    counts, masses = np.zeros(_LEVELS), np.zeros(_LEVELS)
    nobody = np.zeros((0, batch, lookahead))
    tokens, seconds, factor = _verified(
        current, nobody, 0, sums, better, 0, 0, forward_s, draft_s[0, 0], discount, counts, masses
    )
    best, expected_of_it, answer = factor * tokens / seconds, tokens / seconds, (0, 0)
    for whom in (1, 2):
        for index in range(len(depths)):
            all_tokens, discounted, all_seconds = 0.0, 0.0, 0.0
            for draw in range(draws):
                tokens, seconds, factor = _verified(
                    current,
                    expected,
                    draw,
                    sums,
                    better,
                    whom,
                    depths[index],
                    forward_s,
                    draft_s[whom, index],
                    discount,
                    counts,
                    masses,
                )
                all_tokens, all_seconds = all_tokens + tokens, all_seconds + seconds
                discounted += factor * tokens
            if discounted / all_seconds > best:
                best, expected_of_it, answer = discounted / all_seconds, all_tokens / all_seconds, (whom, index)
    return answer[0], answer[1], expected_of_it


@cached_njit(nogil=True)
def _verified(current, expected, draw, sums, better, whom, depth, forward_s, draft_s, discount, counts, masses):
    """Tokens and seconds of one draw, verified as far as is best, and the discount on it: 1 if nothing is verified."""
    batch, lookahead = current.shape
    counts[:] = 0
    masses[:] = 0
    for row in range(batch):
        fresh = False
        if whom == 2 or (whom == 1 and better[row]):
            total = 0.0
            for position in range(depth):
                total += expected[draw, row, position]
            fresh = total > sums[row]
        for position in range(depth if fresh else lookahead):
            value = expected[draw, row, position] if fresh else current[row, position]
            if value <= 0:
                break
            level = min(int((1 - value) * _LEVELS), _LEVELS - 1)
            counts[level] += 1
            masses[level] += value
    num_slots, tokens = 0, float(batch)
    best_tokens, best_seconds, factor = tokens, forward_s[batch] + draft_s, 1.0
    for level in range(_LEVELS):
        if counts[level] > 0:
            num_slots += int(counts[level])
            tokens += masses[level]
            seconds = forward_s[batch + num_slots] + draft_s
            if discount * tokens * best_seconds > factor * best_tokens * seconds:
                best_tokens, best_seconds, factor = tokens, seconds, discount
    return best_tokens, best_seconds, factor
