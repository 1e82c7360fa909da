"""The oracle of `benchmarks.controller`: the best whole-batch choice per step if every draft's outcome were known.

In each step it takes the one speculator and length for the whole batch that yields most tokens per second, at the costs
that the cell's arms measured over all of their steps. It pays only for the drafts that it uses. The controller may
draft for some requests only, and so can beat it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_rl.controller.base import Admission, Controller, Step
from atlas_rl.core import Draft, Prompts, Sequences, Verified
from atlas_rl.policy.base import PolicyCache
from atlas_rl.replay.costs import Costs
from atlas_rl.replay.policy import RecordedPolicy
from atlas_rl.replay.record import Recorded, recorded_calls
from atlas_rl.replay.replay import replay
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from benchmarks.cells import Cell
from benchmarks.common import quantiles
from benchmarks.rollout import mean, ratios


class Foreseen(Speculator):
    """A speculator with known outcomes: `right` holds accepted tokens per row of the last draft."""

    def __init__(self, wrapped: Speculator, truth: Sequences) -> None:
        self.name, self.needs = wrapped.name, wrapped.needs
        self._wrapped, self._truth = wrapped, truth
        self.right = np.zeros(0, np.int64)

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        self._wrapped.start(sequences, requests, prompts, cache)

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        # Its backlog is part of the costs of the arm that it stands for.
        return None if self._wrapped.backlog(sequences, requests) is None else 0

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        draft = self._wrapped.propose(sequences, requests, max_draft_tokens)
        width = draft.token_ids.shape[1]
        column = sequences.lengths[requests][:, None] + np.arange(width)[None]
        inside = column < self._truth.lengths[requests][:, None]
        true = self._truth.token_ids[requests[:, None], np.where(inside, column, 0)]
        stands = inside & (draft.token_ids == true) & (np.arange(width)[None] < draft.lengths[:, None])
        self.right = np.cumprod(stands, axis=1).sum(axis=1)
        return draft

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        self._wrapped.observe(sequences, verified)

    def refresh(self, rollouts: Any, policy_version: int) -> np.ndarray | None:
        return self._wrapped.refresh(rollouts, policy_version)


class Oracle(Controller):
    """Chooses per step the speculator and length for the whole batch that yield most, given every draft's outcome."""

    def __init__(self, foreseen: dict[str, Foreseen], costs: Costs, longest: int) -> None:
        self.speculators = tuple(foreseen)
        self._foreseen, self._costs, self._longest = foreseen, costs, longest
        self.tokens, self.seconds = 0.0, 0.0

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        left = [name for name in step.ready if name not in step.drafts]
        return {name: np.minimum(step.room, self._longest) for name in left if step.room.any()}

    def admit(self, step: Step) -> Admission:
        table = self._costs.forward.predict(step.batch * (1 + self._longest), step.context_tokens)
        assert table is not None
        best = (
            step.batch / table[step.batch],
            float(step.batch),
            float(table[step.batch]),
            0,
            np.zeros(step.batch, int),
        )
        for index, name in enumerate(self.speculators):
            if name not in step.drafts:
                continue
            lengths, right = step.drafts[name].lengths, np.zeros(step.batch, np.int64)
            right[step.asked[name] > 0] = self._foreseen[name].right
            for depth in range(1, self._longest + 1):
                admitted = np.minimum(lengths, depth)
                tokens = step.batch + float(np.minimum(right, depth).sum())
                seconds = float(
                    table[step.batch + int(admitted.sum())] + self._costs.drafts[name].predict(step.batch, depth)
                )
                if tokens / seconds > best[0]:
                    best = (tokens / seconds, tokens, seconds, index, admitted)
        _, tokens, seconds, index, admitted = best
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        return Admission(np.full(step.batch, index), admitted)

    def observe(self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float) -> None:
        """Do nothing: outcomes are known."""

    def policy_updated(self, expected: Any) -> None:
        """Do nothing: outcomes are known."""

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        return None


def oracle_rows(
    cell: Cell,
    folder: Path,
    speculators: Mapping[str, Callable[[], Speculator]],
    state: Mapping[str, Any],
    costs: Costs,
    longest: int,
    speed: Mapping[str, list[float]],
    reports: Mapping[str, list[Any]],
) -> dict[str, Any]:
    """The oracle's row: drafting and forwards from `costs`, everything else per step as in plain decoding."""
    lengths, speeds, policy = [], [], None
    chosen = [make() for make in speculators.values()]
    for path, off in zip(recorded_calls(folder), reports["off"], strict=True):
        recorded = Recorded.load(path)
        if policy is None:
            policy = RecordedPolicy(recorded)
            for speculator in chosen:
                speculator.bind(policy, couples_noise=True)
                speculator.load_state_dict(state[speculator.name])
        policy.follow(recorded)
        foreseen = {speculator.name: Foreseen(speculator, recorded.sequences) for speculator in chosen}
        controller = Oracle(foreseen, costs, longest)
        report = replay(recorded, foreseen, controller, costs)[0]
        lengths.append(report.accepted_length)
        # Plain decoding's time per token for drawing, and per step for bookkeeping.
        turns_s = (off.commit_s + off.other_s) * report.num_forwards / off.num_forwards
        speeds.append(off.num_tokens / (controller.seconds + off.prefill_s + off.sample_s + turns_s))
    return {
        **cell.names,
        "arm": "oracle",
        "tokens_per_s": quantiles(speeds),
        "ratio_to_off": quantiles(ratios(speeds, speed["off"])),
        "accepted_length": float(np.mean(lengths)),
        "entropy": mean(reports["off"], "entropy"),
    }
