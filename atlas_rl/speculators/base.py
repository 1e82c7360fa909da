"""The interface of every speculator. A speculator that runs a network keeps its tensors to itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas_rl.core import Draft, Hidden, Rollouts, Sequences, Verified

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from atlas_rl.policy.base import Backend


class Speculator(ABC):
    """Proposes continuations that the policy verifies.

    Nothing a speculator does can change what is generated, only how fast: under drafter-invariant verification a draft
    is accepted exactly when it is the token the policy would have drawn. A speculator never touches the policy's
    weights, training mode or random state. Implementations raise on internal failure; the loop never hides it.
    """

    name: str
    """Short name used in reports, such as `history` or `draft_lm`."""

    couples_noise: bool = True
    """Whether drafts are drawn with the policy's own noise (`Stream.TARGET`). Engines that verify by rejection set it
    to False, and the speculator then draws with noise of that draft's own or proposes its likeliest token. Either way
    `Sequences.draft_noise` says what to draw with."""

    reads_hidden: bool = False
    """Whether `Verified.hidden.last` is wanted."""

    reads_layers: tuple[int, ...] = ()
    """Decoder layers whose inputs are wanted, of prompts (`read_prompts`) and of verified positions."""

    @property
    def ready(self) -> bool:
        """Whether it can draft yet; until then it is not asked."""
        return True

    @property
    def expected_survival(self) -> np.ndarray | None:
        """Mean probability that draft position 0, 1, ... is accepted together with all before it: float64 `[n]`.

        As measured at the last refresh on the newest rollouts, for speculators that can; None otherwise. It tells the
        controller that a speculator has become good, or bad, without asking it for drafts.
        """
        return None

    def bind(self, policy: nn.Module) -> None:  # noqa: B027 - most need nothing
        """The policy to draft for, before anything else and again whenever the engine gets another one.

        A speculator may read its weights while a call runs (`start`, `propose`, `observe`), when they are whole on every
        rank; at a refresh they may be sharded away.
        """

    def share_cache(  # noqa: B027 - most need nothing
        self, backend: Backend, rows_of: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """The policy's own cache, before the first `start` of a call, for speculators that run the policy's modules.

        Valid until the call ends, and its session is open meanwhile. A request's last committed token is not cached yet;
        cells from there on may be written, because the policy's next forward writes them before it reads them.

        Args:
            backend: Runs the policy over its cache.
            rows_of: Cache rows, int64 `[n]`, of requests in the batch, int64 `[n]`.
        """

    def read_prompts(  # noqa: B027 - most need nothing
        self, sequences: Sequences, groups: list[np.ndarray], hidden: Hidden
    ) -> None:
        """Hidden states of whole prompts: prompt `i` is that of every request in `groups[i]` (int64 `[n]`).

        Called for speculators with `reads_layers`, after the `start` of those requests and before their first `observe`.
        """

    @abstractmethod
    def start(self, sequences: Sequences, requests: np.ndarray) -> None:
        """Requests enter the batch: int64 `[n]` indices into `sequences`, whose prompts are in place.

        Called before the first `propose` that names them; mutates only the speculator's state.
        """

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int:
        """Committed tokens that `propose` for these requests (int64 `[n]`) would have to run before it drafts.

        The controller tells their time from that of drafting: a speculator that was not asked for long has more of them.
        """
        return 0

    @abstractmethod
    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for each request.

        Args:
            sequences: All requests of the call; the context of request `r` is `token_ids[r, :lengths[r]]`.
            requests: int64 `[batch]`.
            max_draft_tokens: int64 `[batch]`, most tokens wanted per request; 0 asks for nothing.

        Returns:
            A `Draft` of the same batch order, each row at most `max_draft_tokens` long.
        """

    @abstractmethod
    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Learn from verified tokens and let go of the state of finished requests."""

    @abstractmethod
    def refresh(self, rollouts: Rollouts, policy_version: int) -> None:
        """The policy moved on to `policy_version`; `rollouts` are the newest finished ones, made by an earlier one."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draft as well as this one: arrays, tensors, numbers, strings; none by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; raises `ValueError` when the state belongs to another kind of speculator or policy."""
        if state:
            raise ValueError(f"the speculator '{self.name}' has no state of its own, got keys {sorted(state)}")
