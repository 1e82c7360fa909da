"""Warns about drafters that have stopped working, in the report of the step in which they stop.

A dead drafter costs speed, never correctness, so nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from atlas_rl.report.recorder import StepRecorder

_ENOUGH = 200  # drafts without a single hit: with a working drafter this happens less than once in 10^8 steps


def findings(recorder: StepRecorder, num_asked: Mapping[str, int], num_proposed: Mapping[str, int]) -> Iterable[str]:
    """Warnings about the drafters of one generation step.

    Args:
        recorder: Holds the counts of verified and accepted drafts.
        num_asked: Draft tokens that each speculator was asked for.
        num_proposed: Draft tokens that each speculator proposed, admitted or not; has the same keys.
    """
    for name, (drafted, accepted) in recorder.draft_counts().items():
        if drafted >= _ENOUGH and accepted == 0:
            yield (
                f"{name}: none of {drafted} verified drafts was accepted; its state was lost or belongs to another "
                "policy or tokenizer"
            )
    for name, proposed in num_proposed.items():
        if proposed == 0 and num_asked[name] >= _ENOUGH:
            yield f"{name}: asked for drafts during the whole step and proposed none"
