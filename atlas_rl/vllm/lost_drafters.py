"""Detects drafters that stop working inside vLLM without an error, and names them in the same step's report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from atlas_rl.report.recorder import StepRecorder
from atlas_rl.speculators.base import Speculator

_ENOUGH_DRAFTS = 32  # draft tokens that raise a warning if none of them is verified
_ENOUGH_MISSES = 256  # draft tokens that are rejected in a row: one update may move a tiny policy far
_USED_TO_HIT = 0.2  # below this share of accepted drafts, a row of misses proves nothing
_FADES = 0.8  # weight of the earlier calls in the running mean
_SAMPLE = 64  # values of each tensor in its fingerprint


class LostDrafters:
    """Compares every call with the calls before it."""

    def __init__(self) -> None:
        self._fingerprints: dict[str, torch.Tensor] = {}
        self._lost: dict[str, None] = {}
        self._hit_rate: dict[str, float] = {}
        self._misses: dict[str, int] = {}  # draft tokens rejected since the drafter's last accepted one

    def remember(self, speculators: Mapping[str, Speculator]) -> None:
        """Remember the drafters' tensors as correct."""
        self._fingerprints = {name: fingerprint(speculator) for name, speculator in speculators.items()}

    def check(self, speculators: Mapping[str, Speculator]) -> None:
        """Check before a call or a refresh whether tensors have changed since `remember`."""
        for name, speculator in speculators.items():
            known, now = self._fingerprints.get(name), fingerprint(speculator)
            if known is not None and (known.shape != now.shape or not torch.equal(known, now)):
                self._lost[name] = None

    def findings(self, recorder: StepRecorder, num_due: int, num_asked: int) -> Iterator[str]:
        """Warnings about a call that has just ended, or about a server's traffic since its last report.

        Args:
            recorder: Counts of verified drafts.
            num_due: Draft tokens that were passed to vLLM for requests of forwards that have run since.
            num_asked: Forwards after which vLLM asked for drafts.
        """
        for name in self._lost:
            yield (
                f"{name}: its tensors changed between two calls, though nobody trained them: lost to the engine's sleep "
                "level 2, or overwritten; it drafts badly until its next refresh or a restart"
            )
        self._lost = {}
        counts = recorder.draft_counts()
        verified = sum(drafted for drafted, _ in counts.values())
        if recorder.speculates and num_due >= _ENOUGH_DRAFTS and verified == 0:
            yield f"speculation is silently disabled: {num_due} draft tokens were handed to vLLM and none was verified"
        if recorder.speculates and not num_asked and recorder.seconds("forward") > 0:
            yield "speculation is silently disabled: vLLM decoded and never asked for drafts"
        yield from self._collapsed(counts)

    def _collapsed(self, counts: Mapping[str, tuple[int, int]]) -> Iterator[str]:
        for name, (drafted, accepted) in counts.items():
            used_to = self._hit_rate.get(name, 0.0)
            self._misses[name] = 0 if accepted else self._misses.get(name, 0) + drafted
            if drafted and self._misses[name] >= _ENOUGH_MISSES and used_to >= _USED_TO_HIT:
                yield (
                    f"{name}: accepted length collapsed to 1.00: none of its last {self._misses[name]} drafts was accepted, "
                    f"{used_to:.0%} were before; it does not follow the policy any more"
                )
                self._misses[name] = 0
            if accepted:
                rate = accepted / drafted
                self._hit_rate[name] = _FADES * used_to + (1 - _FADES) * rate if used_to else rate


def fingerprint(speculator: Speculator) -> torch.Tensor:
    """A few values of every tensor that the speculator owns: float32 `[n]`."""
    parts = [
        tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLE)].float().cpu()
        for tensor in speculator.weights()
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float32, device="cpu")
