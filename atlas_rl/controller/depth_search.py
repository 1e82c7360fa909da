"""How far to ask a speculator, and for which requests: the search over every answer, compiled.

A decision weighs some twenty answers, each a ranking of all draft slots of the batch. In numpy that took 4% of a step.
"""

from __future__ import annotations

import numba
import numpy as np

_LEVELS = 64  # survival probabilities are ranked to within 1/64: this is about drafts that do not exist yet


@numba.njit(cache=True, nogil=True)
def search(there, expected, better, forward_s, draft_s, depths, discount):
    """The answer with the most expected goodput.

    Args:
        there: float64 `[batch, lookahead]`, survival of the draft that each request has; rows never rise.
        expected: float64 `[draws, batch, lookahead]`, of what the speculator might draft: an answer's goodput is that of
            all draws together, of which each is verified as far as is best for it.
        better: bool `[batch]`, requests where it is expected to do better.
        forward_s: float64 `[n]`, seconds of a forward over 0, 1, ... tokens, to at least `batch * (1 + lookahead)`.
        draft_s: float64 `[3, num_depths]`, draft seconds of the step: if nobody more is asked (the first entry), if it is
            asked for `better` to each depth, if it is asked for all.
        depths: int64 `[num_depths]`.
        discount: Factor on the goodput of steps with drafts.

    Returns:
        Whom to ask for (0 nobody, 1 `better`, 2 all), the index of the depth, and the goodput that is expected of it,
        without the factor.
    """
    draws, batch, lookahead = expected.shape
    sums = np.zeros(batch)
    for row in range(batch):
        for position in range(lookahead):
            sums[row] += there[row, position]
    counts, masses = np.zeros(_LEVELS), np.zeros(_LEVELS)
    nobody = np.zeros((0, batch, lookahead))
    tokens, seconds, factor = _verified(
        there, nobody, 0, sums, better, 0, 0, forward_s, draft_s[0, 0], discount, counts, masses
    )
    best, expected_of_it, answer = factor * tokens / seconds, tokens / seconds, (0, 0)
    for whom in (1, 2):
        for index in range(len(depths)):
            all_tokens, discounted, all_seconds = 0.0, 0.0, 0.0
            for draw in range(draws):
                tokens, seconds, factor = _verified(
                    there,
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


@numba.njit(cache=True, nogil=True)
def _verified(there, expected, draw, sums, better, whom, depth, forward_s, draft_s, discount, counts, masses):
    """Tokens and seconds of one draw, verified as far as is best, and the factor that applies: 1 without drafts."""
    batch, lookahead = there.shape
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
            value = expected[draw, row, position] if fresh else there[row, position]
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
