"""Learning of a server's drafters while it has nothing to do, such as while its trainer computes gradients.

A span of learning begins when no request runs and enough new tokens were generated. It goes on from the newest rollouts,
whose hidden states and LM head rows are those of the policy that is served: the policy that drew them. It ends when
learning no longer pays (`learning_budget.SpareLesson`), or when anything arrives: a request, or new weights, which would
make these rollouts an older policy's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atlas_rl.vllm.traffic import WORTH_LEARNING_TOKENS

if TYPE_CHECKING:
    from atlas_rl.vllm.drafting import Drafting


class SpareTime:
    """Uses the idle time of a worker.

    Args:
        drafting: The drafters, and the requests that they follow.
    """

    def __init__(self, drafting: Drafting) -> None:
        self._drafting = drafting
        self._num_known = 0  # tokens that were generated before the last span of learning, or the latest weights
        self._studies = False

    def is_there(self) -> bool:
        """Whether drafters would learn now, if no request runs."""
        table = self._drafting.requests.table
        if table.request_of or table.announced or table.sequences is None:
            return False
        return self._studies or self._drafting.traffic.num_tokens_ever - self._num_known >= WORTH_LEARNING_TOKENS

    def study(self) -> None:
        """Do one piece of learning of one drafter; see `Speculator.study`."""
        drafting, table = self._drafting, self._drafting.requests.table
        began_s = drafting.recorder.clock()
        if not self._studies:
            self._studies = True
            drafting.learn()
            table.sample_as(table.commonest_way)
        if not any(speculator.study() for speculator in drafting.speculators.values()):
            self.rest(expects_tokens=True)
        drafting.recorder.studied(drafting.recorder.clock() - began_s)

    def rest(self, *, expects_tokens: bool) -> None:
        """End a span of learning; the next one waits for new tokens.

        Args:
            expects_tokens: Whether tokens that no span has begun with yet may still be learned from.
        """
        if self._studies:  # what drafters hold to learn from is not for sleep, or for the time of a weight load
            for speculator in self._drafting.speculators.values():
                speculator.end_study()
        if self._studies or not expects_tokens:
            self._studies, self._num_known = False, self._drafting.traffic.num_tokens_ever
