"""Appends settled tokens to the texts: one compiled pass over the rows, and the same in plain numpy.

A step of a few milliseconds leaves no time for a dozen numpy calls over a few hundred rows, nor for a Python loop over
requests. `settle` takes about as long as one numpy call.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from atlas_kernels.jit_cache import cached_njit


class Texts(NamedTuple):
    """Arrays that grow by committed tokens.

    Attributes:
        token_ids: int32 `[num_requests, capacity]`.
        lengths: int64 `[num_requests]`.
        max_lengths: int64 `[num_requests]`, tokens at which a request ends.
        prompt_lengths: int64 `[num_requests]`.
        logprobs: float32 `[num_requests, completion capacity]`; no rows if not wanted.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    max_lengths: np.ndarray
    prompt_lengths: np.ndarray
    logprobs: np.ndarray


class Drawn(NamedTuple):
    """Tokens that a forward settled; only a row's first `num_tokens` columns count.

    Attributes:
        requests: int64 `[batch]`.
        token_ids: int64 `[batch, width]`.
        num_tokens: int64 `[batch]`, at least 1.
        num_drafted: int64 `[batch]`, draft tokens that were verified.
        entropies: float32 `[batch, at least width]`, like the next two.
        max_probs: Probability of the likeliest token.
        logprobs: No rows if not wanted.
        ends: bool `[batch, width]`, tokens that end their request; if it has no rows, `stops` decide.
        stops: int64 `[n]`, tokens that end a request.
    """

    requests: np.ndarray
    token_ids: np.ndarray
    num_tokens: np.ndarray
    num_drafted: np.ndarray
    entropies: np.ndarray
    max_probs: np.ndarray
    logprobs: np.ndarray
    ends: np.ndarray
    stops: np.ndarray


class Fates(NamedTuple):
    """Outcome of each row: three int64 `[batch]` arrays and bool `[batch]`; see `Verified`."""

    num_committed: np.ndarray
    num_accepted: np.ndarray
    num_drafted: np.ndarray
    finished: np.ndarray

    @staticmethod
    def of(batch: int) -> Fates:
        """Empty arrays for `batch` rows."""
        committed, accepted, drafted = (np.empty(batch, np.int64) for _ in range(3))
        return Fates(committed, accepted, drafted, np.empty(batch, np.bool_))


@cached_njit(nogil=True)
def reached(requests, num_tokens, lengths, max_lengths, prompt_lengths):
    """Longest text and longest completion that these requests can reach; arrays as in `settle`."""
    text, completion = 0, 0
    for i in range(len(requests)):
        request = requests[i]
        length = min(lengths[request] + num_tokens[i], max_lengths[request])
        text, completion = max(text, length), max(completion, length - prompt_lengths[request])
    return text, completion


@cached_njit(nogil=True)
def settle(
    requests, token_ids, num_tokens, num_drafted, entropies, max_probs, logprobs, ends, stops,
    rows, lengths, max_lengths, prompt_lengths, own_logprobs,
    num_committed, num_accepted, drafted, finished,
):  # fmt: skip
    """Append every row's tokens up to its first ending one, or to its limit, and fill the fates.

    There must be room for the tokens. Drafts after an accepted ending token count as neither accepted nor rejected.

    The arrays are those of `Drawn`, `Texts` and `Fates`, in their order. They are passed one by one: numba takes some
    microseconds to unpack a named tuple, and a tenth of one for an array.

    Returns:
        Sums of entropies and of largest probabilities over the committed tokens, and the number of these.
    """
    drawn = Drawn(requests, token_ids, num_tokens, num_drafted, entropies, max_probs, logprobs, ends, stops)
    texts = Texts(rows, lengths, max_lengths, prompt_lengths, own_logprobs)
    fates = Fates(num_committed, num_accepted, drafted, finished)
    entropy_sum, max_prob_sum, total = 0.0, 0.0, 0
    for i in range(len(drawn.requests)):
        request, settled = drawn.requests[i], drawn.num_tokens[i]
        length = texts.lengths[request]
        limit = min(settled, texts.max_lengths[request] - length)
        count, stopped = 0, False
        while count < settled and not stopped:
            token = drawn.token_ids[i, count]
            if len(drawn.ends) > 0:
                stopped = drawn.ends[i, count]
            else:
                for stop in drawn.stops:
                    stopped = stopped or token == stop
            count += 1
        count = min(count, limit)
        for j in range(count):
            texts.token_ids[request, length + j] = drawn.token_ids[i, j]
            entropy_sum += drawn.entropies[i, j]
            max_prob_sum += drawn.max_probs[i, j]
            if len(drawn.logprobs) > 0:
                texts.logprobs[request, length - texts.prompt_lengths[request] + j] = drawn.logprobs[i, j]
        texts.lengths[request] = length + count
        total += count
        accepted = min(settled - 1, drawn.num_drafted[i], count)
        fates.num_committed[i], fates.num_accepted[i] = count, accepted
        fates.num_drafted[i] = accepted if settled > count else drawn.num_drafted[i]
        fates.finished[i] = stopped or length + count >= texts.max_lengths[request]
    return entropy_sum, max_prob_sum, total
