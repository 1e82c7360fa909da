"""Counts the traffic of a server, for its reports and for deciding when its drafters learn."""

from __future__ import annotations

from collections import deque

_KEPT_LENGTHS = 4096  # completion lengths of the newest requests, if nobody asks for a report
WORTH_LEARNING_TOKENS = 2048
_LEARNING_SHARE = 0.05  # largest share of a server's time that drafters spend on learning


class Traffic:
    """Counts requests that ended.

    Attributes:
        num_requests: Requests that ended since the last report.
        num_prompt_tokens: Their prompt tokens.
        num_tokens: Their generated tokens.
        completion_lengths: Completion lengths of the newest of them.
        num_tokens_ever: Generated tokens of all requests that have ended.
    """

    def __init__(self) -> None:
        self._new_tokens = self.num_tokens_ever = 0
        self._learn_again_s = 0.0
        self.reset()

    def reset(self) -> None:
        """Restart counting for the next report."""
        self.num_requests, self.num_prompt_tokens, self.num_tokens = 0, 0, 0
        self.completion_lengths: deque[int] = deque(maxlen=_KEPT_LENGTHS)

    def ended(self, num_prompt_tokens: int, num_tokens: int) -> None:
        """Count a request that has ended."""
        self.num_requests += 1
        self.num_prompt_tokens += num_prompt_tokens
        self.num_tokens += num_tokens
        self._new_tokens += num_tokens
        self.num_tokens_ever += num_tokens
        self.completion_lengths.append(num_tokens)

    def worth_learning(self, now_s: float) -> bool:
        """Whether there is enough new traffic to learn from, and enough time since drafters last learned."""
        return self._new_tokens >= WORTH_LEARNING_TOKENS and now_s >= self._learn_again_s

    def learned(self, now_s: float, seconds: float) -> None:
        """Record that drafters have learned, which took `seconds`."""
        self._new_tokens = 0
        self._learn_again_s = now_s + seconds / _LEARNING_SHARE
