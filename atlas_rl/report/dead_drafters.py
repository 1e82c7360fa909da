"""Fail loud: drafters that have died are named on the step it happens. Their death costs speed, never correctness."""

from __future__ import annotations

from collections.abc import Iterable

from atlas_rl.decode.propose import Proposing
from atlas_rl.report.recorder import StepRecorder

_ENOUGH = 200  # drafts without a single hit: chance does that to a living drafter less than once in 10^8 steps


def findings(recorder: StepRecorder, proposing: Proposing) -> Iterable[str]:
    """Warnings about one generation step.

    Args:
        recorder: What was verified.
        proposing: What speculators were asked for, and what they proposed, admitted or not.
    """
    for name, (drafted, accepted) in recorder.draft_counts().items():
        if drafted >= _ENOUGH and accepted == 0:
            yield (
                f"{name}: none of {drafted} verified drafts was accepted; its state was lost or belongs to another "
                "policy or tokenizer"
            )
    for name, proposed in proposing.num_proposed.items():
        if proposed == 0 and proposing.num_asked[name] >= _ENOUGH:
            yield f"{name}: asked for drafts during the whole step and proposed none"
