"""The interface of every speculator. The tensors of a speculator's network belong to it alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas_rl.core import Draft, Hidden, Needs, Prompts, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.policy.captures import Captured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from atlas_rl.policy.base import PolicyCache
    from atlas_rl.policy.view import PolicyView

NO_PROMPTS = Prompts()


@dataclass(slots=True)  # one per step: a frozen one takes a call per field to make
class Coming:
    """Outcome of a forward that the device knows before the host: what a draft ahead is made from.

    Work that is queued on the device now reads it there. The choices after a request's ending token are not cut off:
    such a request ends, and its draft is dropped.

    Attributes:
        requests: int64 `[batch]`; `Sequences` has none of the forward's tokens yet.
        token_ids: int64 `[num_positions]` on the device, the policy's choice at every position of the forward. It is
            meaningless where the logits are no distribution.
        num_accepted: int64 `[batch]` on the device, accepted draft tokens. A request's newest token is its choice at
            position `hidden.starts + num_accepted`.
        hidden: States that the choices are drawn from; `Verified` has the same object.
    """

    requests: np.ndarray
    token_ids: torch.Tensor
    num_accepted: torch.Tensor
    hidden: Hidden


class Speculator(ABC):
    """Proposes continuations that the policy verifies.

    Nothing a speculator does can change what is generated, only how fast. Under drafter-invariant verification a draft
    is accepted exactly when it is the token the policy would have drawn. A speculator never touches the policy's
    weights, training mode or random state. Implementations raise on internal failure; the loop never hides it.

    Order of the calls: `bind`; then in every generation call `compile_for` (if that kind of call is new), `start` for each
    group of requests that enters the batch, per decode step `backlog`, `propose` (if the controller asks), `observe`,
    and `learn`, which may come late, and at the end `release`; between calls `refresh`.
    """

    name: str
    """Short name used in reports, such as `history` or `draft_lm`."""

    needs: Needs = Needs()
    """What it needs from the policy's forwards. Valid after `bind`."""

    observes_late: bool = False
    """Whether `observe` may wait until a draft is asked for, or the device runs the next forward. `start` waits for it.
    `backlog` comes before it then, and must not depend on it."""

    _couples_noise: bool = True

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Draft for this policy, on the device where it is now.

        Called before anything else, and again whenever the policy is replaced or has moved to another device.

        Args:
            policy: May be read while a call runs (`start`, `propose`, `observe`), when its weights are whole on every
                rank. At a refresh they may be sharded.
            couples_noise: Whether drafts are drawn with the policy's own noise (`Stream.TARGET`). Engines that verify by
                rejection pass False: the speculator then draws with independent noise, or proposes its likeliest token.
                `Sequences.draft_noise` gives the noise in either case.

        Raises:
            ValueError: It cannot draft for this policy; the message says why.
        """
        self._couples_noise = couples_noise

    def compile_for(self, sampling: SamplingParams) -> None:
        """Compile the GPU kernels of drafts in a call beforehand, so that no step waits for compilation.

        Engines ask once for each kind of sampling, before the first step. By default there is nothing to compile.
        """
        return

    @abstractmethod
    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """Take in requests that enter the batch. A new `Sequences` starts a new call, which ends the previous one.

        Changes only the speculator's own state.

        Args:
            sequences: All requests of the call.
            requests: int64 `[n]`, those that enter; their prompts are in place.
            prompts: Hidden states of their prompts, for speculators that need layers. Engines with a prefix cache do
                not always run a prompt again, so some requests may be missing.
            cache: The policy's own cache, for speculators that need it; None if the engine does not share one.
        """

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        """Committed tokens that `propose` for these requests (int64 `[n]`) has to process before it drafts.

        The controller accounts for them separately: a speculator that has been idle for many steps has more to catch up on.
        Inside vLLM it is asked before `observe` of the latest forward, and again afterwards if it is to draft.

        Returns:
            The number of tokens; None if the speculator cannot draft yet and must not be asked.
        """
        return 0

    @abstractmethod
    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for each request.

        Args:
            sequences: All requests of the call; the context of request `r` is `token_ids[r, :lengths[r]]`.
            requests: int64 `[batch]`.
            max_draft_tokens: int64 `[batch]`, most tokens wanted per request; 0 for none.

        Returns:
            A `Draft` with its rows in the same order, each at most `max_draft_tokens` long.
        """

    def drafts_ahead(self, sampling: SamplingParams) -> bool:
        """Whether `propose_ahead` is available in a call with these parameters; by default it is not.

        Constant during a call.
        """
        return False

    def propose_ahead(self, sequences: Sequences, coming: Coming, num_tokens: int) -> Callable[[], Draft]:
        """Queue the next draft on the device, behind a verification whose outcome the host does not know yet.

        Its tokens and confidences are those that `propose` would give after the outcome. The host must not wait here.
        Asked only if drafts are drawn with the policy's noise, whatever is drafted then changes no token.

        Args:
            sequences: All requests, without the tokens to come.
            coming: The outcome.
            num_tokens: Draft tokens for each request, at least 1.

        Returns:
            Function that waits for the draft of `coming.requests`. It is called before the next draft is queued, or never
            if the outcome did not hold or no request goes on. `observe` of the outcome may come before or after. Rows of
            requests that have ended are undefined.
        """
        raise NotImplementedError(f"the speculator '{self.name}' does not draft ahead")

    @property
    def once_s(self) -> float:
        """Seconds so far that drafts took for work that is done once, such as capturing; by default there is none.

        What `propose_ahead` adds is no part of what the forward costs that it is queued behind.
        """
        return 0.0

    @abstractmethod
    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Follow verified tokens as far as the next draft needs it, and release the state of finished requests."""

    def learn(self) -> None:
        """Finish the work of `observe` that no draft waits for.

        Engines call this while the device runs the next forward, so that it adds no time to a step. It may come late or
        not at all: deferred work is done when it is needed at the latest, or when the next `observe` defers more. By
        default nothing is deferred.
        """
        return

    def study(self) -> bool:
        """Learn a little more from the latest call: an engine has nothing to do, and no request of it runs.

        A request may wait for a piece of work, so it is one optimizer step, or another part of learning of its own.

        Returns:
            Whether there is more that is worth learning; False by default.
        """
        return False

    def end_study(self) -> None:
        """Free what `study` holds: there is no more time, or nothing more to learn. By default nothing is held."""
        return

    def release(self) -> None:
        """Free the memory that grows with the rows and lengths of a call, such as a cache: the call has ended.

        Engines ask for this however a call ends, in the middle of a step as well, so that training has the memory. What
        was learned, indexes, and data to learn from stay. The next call begins with `start`. By default nothing is held.
        """
        return

    @abstractmethod
    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Follow the policy to its new version.

        Args:
            rollouts: The newest finished rollouts, made by an earlier version.
            policy_version: Policy version from now on.

        Returns:
            Mean probability that draft position 0, 1, ... is accepted together with all before it, float64 `[n]`, as
            measured on the newest rollouts; None for speculators that do not measure it. It tells the controller how
            good the speculator has become, without asking it for drafts.
        """

    def shared(self) -> torch.Tensor | None:
        """This rank's summand for learning across ranks: float32 `[n]`, of equal length on all ranks that have one.

        Ranks sum these vectors after an optimizer step. None, the default, if there is nothing to sum.
        """
        return None

    def take_shared(self, total: torch.Tensor) -> None:
        """Take the sum over all ranks, float32 `[n]`, equal on every rank. By default nothing is shared."""
        return

    def take_captured(self) -> Captured:
        """The cost of its CUDA graphs since this was asked last; by default it has none. Engines ask after every call."""
        return Captured()

    def weights(self) -> Iterable[torch.Tensor]:
        """Tensors of its own networks; none by default. Engines that sleep check that they are not lost."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs to draft as well: arrays, tensors, numbers, strings; none by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`. State from a file may be damaged: check it before changing anything.

        Raises:
            ValueError: The state is damaged, or of another kind of speculator or policy; nothing has changed then.
        """
        if state:
            raise ValueError(
                f"the speculator '{self.name}' has no state of its own, got keys {sorted(map(str, state))}"
            )
