"""Speculators and controller beside an engine that runs its own steps: observe what a forward settled, draft for the next.

The same verbs as in `decode/loop.py`, with the engine between them: it schedules, runs and commits, and says after every
forward what it committed. A draft is therefore planned at the end of one forward and verified by the next, whose batch may
differ: requests come, go and pause in between. The controller learns from a forward only where the batch is the one that it
planned for, speculators from every one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from atlas_kernels.noise import mix64
from atlas_rl.controller.base import Admission, Controller, Step
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Hidden, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.decode.propose import Proposing, merge
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import StepReport
from atlas_rl.speculators.base import Speculator
from atlas_rl.sync.refresh import PolicyTracker
from atlas_rl.vllm.internals import Forward, Request
from atlas_rl.vllm.prompt_states import PromptStates
from atlas_rl.vllm.request_fields import EXTRA_KEY, arrival_of
from atlas_rl.vllm.request_table import Arrival, Roster


@dataclass(slots=True)
class _Planned:
    """What was planned for the next forward: `requests` int64 `[batch]`, and when planning began."""

    step: Step
    admission: Admission
    requests: np.ndarray
    began_s: float


@dataclass(slots=True)
class _Committed:
    """What a forward committed, of the requests that are followed: requests with a plan first, in its order.

    Attributes:
        rows: int64 `[n]`, rows of the forward.
        num_planned: How many of them had a plan.
        verified: For the speculators.
        as_planned: Whether the forward ran the planned batch and nothing else.
    """

    rows: np.ndarray
    num_planned: int
    verified: Verified
    as_planned: bool


class Drafting:
    """Follows the requests of one engine and drafts for them.

    Args:
        max_draft_tokens: Most draft tokens per request and step.
        max_length: Most tokens of a request, prompt included.
        max_batch: Most requests that run together.
        vocab_size: The policy's vocabulary.
        seed: Of the noise of requests that bring no seed of their own.
    """

    def __init__(self, max_draft_tokens: int, max_length: int, max_batch: int, vocab_size: int, seed: int = 0) -> None:
        self.roster = Roster(max(64, 2 * max_batch), max_length, vocab_size)
        self.tracker = PolicyTracker()
        self.prompt_states = PromptStates()
        self.speculates = True
        self._max_draft_tokens = max_draft_tokens
        self._seed, self._num_unseeded = seed, 0
        self._seen_version, self._num_reports = 0, 0
        self._ended: list[tuple[int, int]] = []  # prompt and completion tokens of requests nobody announced
        self._keys: dict[str, int] = {}
        self.use({}, GoodputController(()))

    def use(self, speculators: Mapping[str, Speculator], controller: Controller) -> None:
        """Draft with these from now on; they know the policy."""
        self.speculators, self.controller = dict(speculators), controller
        self.record(StepRecorder(speculators=tuple(speculators)))

    def record(self, recorder: StepRecorder) -> None:
        """Count from here on into `recorder`."""
        self.recorder = recorder
        self.proposing = Proposing(self.speculators, self.controller, recorder)
        self.no_speculation_forward_s = 0.0
        self.num_planned = 0
        self._planned: _Planned | None = None
        self._forward_mark_s = recorder.seconds("forward")

    def begin(self, sequences: Sequences, limits: np.ndarray, recorder: StepRecorder, speculates: bool) -> None:
        """A call of ours begins. Its requests carry their index and key in vLLM's `extra_args`."""
        if sequences.policy_version != self._seen_version:
            self.prompt_states.clear()
            self._seen_version = sequences.policy_version
        self.speculates = speculates
        self.record(recorder)
        self.roster.announce(sequences, limits)

    def end(self) -> None:
        """The call is over."""
        self.roster.close()
        self._planned, self.speculates = None, True

    def policy_updated(self, version: int | None = None) -> None:
        """New weights, on an engine whose requests nobody announces: drafters learn from what they have seen."""
        sampling = None if self.roster.sequences is None else self.roster.sequences.sampling
        self.prompt_states.clear()
        if sampling is None:
            self.tracker.advance(self.speculators, self.controller, version)
        else:
            self._turn(sampling, version)

    def take_report(self) -> StepReport:
        """What was done for requests that ended since the last call, on an engine whose requests nobody announces.

        `generate_s` is the time in which the worker was busy.
        """
        ended, self._ended = self._ended, []
        report = self.recorder.finish(
            step=self._num_reports,
            policy_version=self.tracker.version,
            mode="standalone",
            num_prompt_tokens=sum(prompt for prompt, _ in ended),
            completion_lengths=[completion for _, completion in ended],
        )
        plain_s = report.prefill_s + report.sample_s + report.commit_s * report.accepted_length
        plain_s += self.no_speculation_forward_s
        self._num_reports += 1
        self.record(StepRecorder(speculators=tuple(self.speculators)))
        return replace(report, no_speculation_s=plain_s if self.speculators else None)

    def keys(self, requests: list[Request]) -> np.ndarray:
        """Noise keys uint64 `[rows]`: ours, or of the request's seed, or of its turn, which is the same on every rank."""
        for request in requests:
            if request.name not in self._keys:
                self._keys[request.name] = self._key_of(request)
        return np.array([self._keys[request.name] for request in requests], np.uint64)

    def forget(self, names: set[str]) -> None:
        """The engine has ended these requests, perhaps for a reason that is not seen here (a stop string, a client gone)."""
        for name in names:
            self._keys.pop(name, None)
            self.prompt_states.drop(name)
            if name in self.roster.request_of:
                self._abandon(self.roster.request_of[name])
                self.roster.leave(name)

    def step(self, forward: Forward) -> list[list[int]]:
        """Learn from a forward and draft for the next one: draft tokens of every row."""
        drafts: list[list[int]] = [[] for _ in forward.sampled]
        now = self.recorder.clock()
        with self.recorder.time("observe"):
            followed = self._follow(forward)
        if not followed:
            self._planned = None
            return drafts
        with self.recorder.time("commit"):
            committed = self._commit(forward, np.array(followed))
            forward_s = self._account(forward, committed)
        with self.recorder.time("observe"):
            self._observe(committed, forward_s, now)
        self._plan(committed, drafts)
        return drafts

    # ------------------------------------------------------------------------------------------------------- observing

    def _key_of(self, request: Request) -> int:
        extra, seed = request.params.extra_args or {}, request.params.seed
        if EXTRA_KEY in extra:
            return int(extra[EXTRA_KEY])
        if seed is None:
            self._num_unseeded += 1
            return mix64(mix64(self._seed) ^ self._num_unseeded)
        return mix64(mix64(seed) ^ ~0 & 0xFFFFFFFFFFFFFFFF)

    def _follow(self, forward: Forward) -> list[int]:
        """Rows with new tokens whose requests drafters know, newcomers included."""
        batch, newcomers = forward.batch, []
        self._read_prompts(forward)
        for row, (request, new) in enumerate(zip(batch.requests, forward.sampled, strict=True)):
            known = request.name in self.roster.request_of
            # Only a request that has just finished its prompt can be entered: drafters want all that follows it.
            if new and not known and batch.lengths[row] - len(new) == request.num_prompt_tokens:
                newcomers.append(row)
        for row in newcomers:
            self._enter(arrival_of(batch.requests[row], self._keys[batch.requests[row].name]), batch.token_ids[row])
        self._start([batch.requests[row].name for row in newcomers])
        self._hand_over_prompts(forward, newcomers)
        return [row for row, new in enumerate(forward.sampled) if new and self._is_followed(forward, row)]

    def _read_prompts(self, forward: Forward) -> None:
        """Keep what the forward says of prompts that are not complete, for drafters that read layers."""
        for (begin, count, position), request in zip(forward.spans.tolist(), forward.batch.requests, strict=True):
            if not forward.layers or request.name in self.roster.request_of:
                continue
            end = min(count, request.num_prompt_tokens - position)
            if end > 0:
                pieces = {n: states[begin : begin + end] for n, states in forward.layers.items()}
                self.prompt_states.add(request.name, position, pieces)

    def _hand_over_prompts(self, forward: Forward, newcomers: list[int]) -> None:
        for row in newcomers if forward.layers else ():
            request = forward.batch.requests[row]
            tokens = forward.batch.token_ids[row, : request.num_prompt_tokens]
            states = self.prompt_states.take(request.name, tokens)
            index = self.roster.request_of.get(request.name)
            if states is None or index is None or not self.speculates:
                continue
            assert self.roster.sequences is not None
            for speculator in self.speculators.values():
                if speculator.reads_layers:
                    hidden = Hidden(np.zeros(1, np.int64), None, states)
                    speculator.read_prompts(self.roster.sequences, [np.array([index])], hidden)

    def _is_followed(self, forward: Forward, row: int) -> bool:
        request = self.roster.request_of.get(forward.batch.requests[row].name)
        if request is None:
            return False
        assert self.roster.sequences is not None
        expected = self.roster.sequences.lengths[request] + len(forward.sampled[row])
        assert expected == forward.batch.lengths[row], "every committed token passes here"
        return True

    def _enter(self, arrival: Arrival, tokens: np.ndarray) -> None:
        if arrival.request is None:
            if self.roster.is_over(arrival.sampling):
                self._turn(arrival.sampling, self.tracker.version)
            if self.roster.announced or not self.roster.belongs(arrival.sampling) or not self.roster.has_room:
                return  # served without drafts
        self.roster.enter(arrival, tokens[: arrival.num_prompt_tokens])

    def _start(self, names: list[str]) -> None:
        entered = [self.roster.request_of[name] for name in names if name in self.roster.request_of]
        if entered and self.speculates:
            assert self.roster.sequences is not None
            for speculator in self.speculators.values():
                speculator.start(self.roster.sequences, np.array(entered))

    def _turn(self, sampling: SamplingParams, version: int | None) -> None:
        """End the epoch: drafters learn from it. Requests that still run move into the next one."""
        old = self.roster.sequences
        if old is not None:
            self.tracker.finished(Rollouts(old, self.recorder.seconds("forward") + self.recorder.seconds("prefill")))
        self.tracker.advance(self.speculators, self.controller, version)
        self.roster.open(sampling, self.tracker.version)
        self._planned = None
        self._start(list(self.roster.request_of))

    def _commit(self, forward: Forward, followed: np.ndarray) -> _Committed:
        """Append what the forward settled, up to an ending token."""
        sequences = self.roster.sequences
        assert sequences is not None
        rows, num_planned, complete = self._in_order(forward, followed)
        requests = self._requests_of(forward, rows)
        num_new = np.array([len(forward.sampled[row]) for row in rows])
        tokens = np.zeros((len(rows), int(num_new.max())), np.int64)
        for i, row in enumerate(rows):
            tokens[i, : num_new[i]] = forward.sampled[row]
        there = np.arange(tokens.shape[1])[None] < num_new[:, None]
        ends = sequences.sampling.ends(tokens) & there
        stopped = ends.any(axis=1)
        num_committed = np.where(stopped, ends.argmax(axis=1) + 1, num_new)
        num_committed = np.minimum(num_committed, self.roster.limits[requests] - sequences.lengths[requests])
        for i, request in enumerate(requests):
            begin = sequences.lengths[request]
            sequences.token_ids[request, begin : begin + num_committed[i]] = tokens[i, : num_committed[i]]
        sequences.lengths[requests] += num_committed
        finished = stopped | (sequences.lengths[requests] >= self.roster.limits[requests])
        for i in np.flatnonzero(finished).tolist():
            if not self.roster.announced:
                prompt = int(sequences.prompt_lengths[requests[i]])
                self._ended.append((prompt, int(sequences.lengths[requests[i]]) - prompt))
            self.roster.leave(forward.batch.requests[rows[i]].name)
        accepted = np.minimum(num_new - 1, num_committed)
        # Drafts behind an accepted ending token were neither accepted nor rejected.
        num_drafted = np.where(num_new - 1 >= num_committed, accepted, forward.num_drafted[rows])
        verified = Verified(requests, tokens, num_committed, accepted, num_drafted, finished, _hidden(forward, rows))
        as_planned = complete and len(rows) == num_planned == len(forward.sampled)
        return _Committed(rows, num_planned, verified, as_planned)

    def _in_order(self, forward: Forward, followed: np.ndarray) -> tuple[np.ndarray, int, bool]:
        """Followed rows, planned ones first and in the plan's order; how many those are, and whether they are all."""
        planned = self._planned
        if planned is None:
            return followed, 0, False
        row_of = dict(zip(self._requests_of(forward, followed).tolist(), followed.tolist(), strict=True))
        first = [row_of.pop(request) for request in planned.requests.tolist() if request in row_of]
        rows = np.array(first + list(row_of.values()), np.int64)
        return rows, len(first), len(first) == len(planned.requests)

    def _requests_of(self, forward: Forward, rows: np.ndarray) -> np.ndarray:
        return np.array([self.roster.request_of[forward.batch.requests[row].name] for row in rows], np.int64)

    def _account(self, forward: Forward, committed: _Committed) -> float:
        """Count the forward; returns its seconds."""
        verified, n = committed.verified, committed.num_planned
        mark, self._forward_mark_s = self._forward_mark_s, self.recorder.seconds("forward")
        forward_s = self._forward_mark_s - mark
        within = np.arange(forward.drawn.entropies.shape[1])[None] < verified.num_committed[:, None]
        self.recorder.distribution(
            entropy_sum=float(forward.drawn.entropies[committed.rows][within].sum()),
            max_prob_sum=float(forward.drawn.max_probs[committed.rows][within].sum()),
            num_tokens=int(verified.num_committed.sum()),
        )
        if n == 0:
            return forward_s
        speculates = self.recorder.speculates
        assert self._planned is not None
        arms = self._arms(committed)
        self.recorder.forward(
            num_committed=verified.num_committed[:n],
            num_drafted=verified.num_drafted[:n] if speculates else None,
            num_accepted=verified.num_accepted[:n] if speculates else None,
            arms=arms if speculates else None,
        )
        plain_s = forward_s
        if verified.num_drafted[:n].any():
            step = self._planned.step
            plain_s = self.controller.plain_forward_s(step.batch, step.context_tokens) or forward_s
        # Plain decoding needs one forward of this batch for every token per request that this step committed.
        self.no_speculation_forward_s += plain_s * float(verified.num_committed[:n].mean())
        return forward_s

    def _arms(self, committed: _Committed) -> np.ndarray:
        assert self._planned is not None
        index = {request: i for i, request in enumerate(self._planned.requests.tolist())}
        planned = committed.verified.requests[: committed.num_planned].tolist()
        return self._planned.admission.arms[[index[request] for request in planned]]

    def _observe(self, committed: _Committed, forward_s: float, now: float) -> None:
        if not self.speculates:
            return
        planned, verified, sequences = self._planned, committed.verified, self.roster.sequences
        assert sequences is not None
        if planned is not None and committed.as_planned:
            # What the scheduler left out of a draft was not verified, and did not cost.
            admission = Admission(planned.admission.arms, verified.num_drafted.copy())
            self.controller.observe(planned.step, admission, verified, forward_s, now - planned.began_s)
        for speculator in self.speculators.values():
            speculator.observe(sequences, verified)

    def _abandon(self, request: int) -> None:
        """A request that ended unseen counts as finished; nothing new is known of it."""
        sequences, one = self.roster.sequences, np.array([request])
        assert sequences is not None
        none = np.zeros(1, np.int64)
        ended = Verified(one, np.zeros((1, 0), np.int64), none, none, none, np.ones(1, bool))
        for speculator in self.speculators.values() if self.speculates else ():
            if not speculator.reads_hidden and not speculator.reads_layers:
                speculator.observe(sequences, ended)

    # -------------------------------------------------------------------------------------------------------- drafting

    def _plan(self, committed: _Committed, drafts: list[list[int]]) -> None:
        """Plan and propose for the requests that go on; their draft tokens go into `drafts`, by row."""
        verified, sequences = committed.verified, self.roster.sequences
        assert sequences is not None
        going = np.flatnonzero(~verified.finished)
        self._planned = None
        if not len(going):
            return
        requests, rows, began_s = verified.requests[going], committed.rows[going], self.recorder.clock()
        lengths = sequences.lengths[requests]
        room = np.minimum(self.roster.limits[requests] - lengths - 1, self._max_draft_tokens)
        names = list(self.speculators) if self.speculates else []
        ready = [name for name in names if self.speculators[name].ready]
        step = Step(room, int(lengths.sum()), ready, drawn_as=sequences.sampling.distribution)
        admission = Admission(np.zeros(len(room), np.int64), np.zeros(len(room), np.int64))
        if names:
            self.proposing.run(step, sequences, requests)
            with self.recorder.time("controller"):
                admission = self.controller.admit(step)
                draft = merge(step.drafts, names, admission, sequences.vocab_size)
            for i, row in enumerate(rows):
                drafts[row] = draft.token_ids[i, : draft.lengths[i]].tolist()
            self.num_planned += int(draft.lengths.sum())
        self._planned = _Planned(step, admission, requests, began_s)


def _hidden(forward: Forward, rows: np.ndarray) -> Hidden:
    """Hidden states at the positions that were drawn from; layers come for every token of the forward."""
    counts = forward.num_drafted + 1
    ends = forward.spans[:, 0] + forward.spans[:, 1]
    at = torch.from_numpy(np.concatenate([np.arange(e - n, e) for e, n in zip(ends, counts, strict=True)]))
    layers = {n: states[at.to(states.device)] for n, states in forward.layers.items()}
    return Hidden(forward.first[rows], forward.hidden, layers)
