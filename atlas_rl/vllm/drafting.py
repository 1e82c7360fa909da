"""Speculators and controller beside an engine that runs its own steps: observe a forward's outcome, draft for the next.

The verbs are those of `decode/loop.py`, with the engine between them: the engine schedules, runs and commits, and
reports after every forward what it committed. A draft is therefore planned at the end of one forward and verified by
the next, whose batch may differ: requests arrive, end and pause in between. Speculators learn from every forward, the
controller only from forwards whose batch is the planned one.

The device is idle between two forwards. So `step` does only what the next drafts need, and `learn` learns from a
forward while the device runs the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from atlas_rl.controller.base import Admission, Controller, Step
from atlas_rl.controller.fixed import NoSpeculation
from atlas_rl.core import Draft, Prompts, Rollouts, SamplingParams, Verified
from atlas_rl.counts import asked_of
from atlas_rl.decode.commit import account
from atlas_rl.decode.generate import Call
from atlas_rl.decode.guard import Faults
from atlas_rl.decode.plain_run import PlainCosts, PlainForwards, plain_batches
from atlas_rl.decode.propose import merge
from atlas_rl.policy.captures import Captured
from atlas_rl.report import dead_drafters
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import StepReport
from atlas_rl.speculators.base import Speculator
from atlas_rl.sync.refresh import PolicyTracker
from atlas_rl.vllm.following import RequestFollower
from atlas_rl.vllm.graphs import uniform_drafts
from atlas_rl.vllm.internals import Forward
from atlas_rl.vllm.lost_drafters import LostDrafters
from atlas_rl.vllm.row_passes import NO_PLAN, PlannedRows
from atlas_rl.vllm.settling import Committed, commit_rows
from atlas_rl.vllm.traffic import Traffic
from atlas_rl.vllm.ways import ProposingInWays, observing_in_ways


@dataclass(frozen=True, slots=True)
class _Planned:
    """The plan for the next forward: `requests` int64 `[batch]`, and when planning began."""

    step: Step
    admission: Admission
    requests: np.ndarray
    began_s: float


@dataclass(frozen=True, slots=True)
class _Unlearned:
    """A forward that speculators and controller have not learned from yet.

    Attributes:
        planned: The plan for it; None if there was none.
        committed: What it committed.
        forward_s: Its seconds.
        step_s: Seconds since planning began.
    """

    planned: _Planned | None
    committed: Committed
    forward_s: float
    step_s: float


class Drafting:
    """Follows the requests of one engine and drafts for them.

    Args:
        max_draft_tokens: Most draft tokens per request and step.
        max_length: Most tokens of a request, prompt included.
        max_batch: Most requests that run together.
        vocab_size: The policy's vocabulary.
        seed: Seed of the noise of requests that bring no seed of their own.
    """

    def __init__(self, max_draft_tokens: int, max_length: int, max_batch: int, vocab_size: int, seed: int = 0) -> None:
        self.requests, self.vocab_size = RequestFollower(max_length, max_batch, vocab_size, seed), vocab_size
        self.tracker, self.faults, self.speculates = PolicyTracker(), Faults(), True
        self.num_undefined = 0  # positions with logits that are no distribution, in this call or so far
        self._max_draft_tokens, self._max_length, self._max_batch = max_draft_tokens, max_length, max_batch
        self._seen_version, self._num_reports = 0, 0
        self.traffic = Traffic()  # unannounced requests
        self._lost = LostDrafters()  # in their drafts, not in calls of ours
        self._unlearned: _Unlearned | None = None
        self._beside_s = 0.0  # seconds of learning while a device ran the forward
        self.recorder = StepRecorder()
        self._epoch_mark_s = 0.0  # value of `_busy_s` when the epoch began
        self.use({}, NoSpeculation())

    def use(self, speculators: Mapping[str, Speculator], controller: Controller) -> None:
        """Draft with these speculators from now on; they are bound to the policy."""
        self._count()
        self.speculators, self.controller = dict(speculators), controller
        self.observing = observing_in_ways(self.speculators, self.requests.table)
        self.record(StepRecorder(speculators=tuple(speculators)))

    def record(self, recorder: StepRecorder) -> None:
        """Count into `recorder` from now on."""
        self._count()
        self._epoch_mark_s -= self._busy_s()
        self.recorder = recorder
        self.proposing = ProposingInWays(
            self.speculators, self.controller, recorder, self.observing, self.requests.table
        )
        self._plain_costs = PlainCosts()
        self.num_due = self.num_steps = 0  # see `LostDrafters.findings`
        self._planned: _Planned | None = None
        self._forward_mark_s = recorder.seconds("forward")

    def begin(self, call: Call) -> int:
        """Begin a call of ours. Returns its ticket: requests carry it, with their index, in vLLM's `extra_args`."""
        self._settle()
        if call.sequences.policy_version != self._seen_version:
            self.requests.prompt_states.clear()
            self._seen_version = call.sequences.policy_version
        self.speculates = bool(call.speculators)
        if self.speculates:
            self.speculators, self.controller = dict(call.speculators), call.controller
            self.observing = observing_in_ways(self.speculators, self.requests.table)
        self.record(call.recorder)
        self.num_undefined = 0
        return self.requests.table.announce(call.sequences, call.max_lengths)

    def plain_forwards(self, call: Call) -> PlainForwards:
        """Forwards that the tokens of a finished `call` take without speculation; its sequences are complete."""
        lengths = call.sequences.lengths - call.sequences.prompt_lengths
        return self._plain_costs.run(plain_batches(lengths, self._max_batch), call.controller.plain_forward_s)

    def end(self) -> None:
        """End the call."""
        self._settle()
        self.requests.table.close()
        self._planned, self.speculates = None, True

    def policy_updated(self, version: int | None = None) -> None:
        """New weights on an engine with unannounced requests: drafters learn from the rollouts they have seen."""
        self._settle()
        table = self.requests.table
        self.requests.prompt_states.clear()
        self._end_epoch()
        with self.recorder.time("refresh"):
            self._refresh(version)
        if table.sequences is not None:
            self._begin_epoch(table.current.sampling)

    def take_report(self) -> StepReport:
        """Report on requests that ended since the last report, on an engine with unannounced requests.

        `generate_s` is the time in which the worker was busy. The time without speculation is not estimated for a
        server: nobody knows which requests would have run together then.
        """
        self._count()
        traffic = self.traffic
        dead = dead_drafters.findings(self.recorder, self.proposing.num_asked, self.proposing.num_proposed)
        for message in (*dead, *self._lost.findings(self.recorder, self.num_due, self.num_steps)):
            self.recorder.warn(message)
        self.report_to(self.recorder)
        report = self.recorder.finish(
            step=self._num_reports,
            policy_version=self.tracker.version,
            mode="standalone",
            num_prompt_tokens=traffic.num_prompt_tokens,
            completion_lengths=traffic.completion_lengths,
        )
        # If many requests have ended, the lengths are those of the newest ones.
        report = replace(report, num_requests=traffic.num_requests, num_tokens=traffic.num_tokens)
        traffic.reset()
        self._num_reports += 1
        self.record(StepRecorder(speculators=tuple(self.speculators)))
        return report

    def report_to(self, recorder: StepRecorder) -> None:
        """Hand over the cost of drafters' CUDA graphs, and caught errors, to a recorder, once."""
        captured = Captured.of(speculator.take_captured() for speculator in self.speculators.values())
        recorder.captured(captured.seconds, captured.num_bytes)
        self.faults.report_to(recorder)

    def forget(self, names: set[str]) -> None:
        """The engine has ended these requests, perhaps for a reason unknown here (a stop string, a lost client)."""
        for name in names:
            row = self.requests.forget(name)
            if row is not None:
                self._settle()
                self._count_ended(row)
                self._abandon(row)

    def give_up(self) -> None:
        """After an error, let running requests continue without drafts."""
        table = self.requests.table
        if not table.announced:
            table.close()
        table.request_of, self._planned, self._unlearned = {}, None, None
        self.observing.drop()

    def step(self, forward: Forward) -> list[list[int]]:
        """Draft for the next forward after the last one: draft tokens of every row."""
        self.learn()
        self.num_steps += 1
        drafts: list[list[int]] = [[] for _ in forward.batch.names]
        now_s = self.recorder.clock()
        with self.recorder.time("commit"):
            committed = self._commit(forward)
        if committed is None:
            self._planned = None
            return drafts
        step_s = now_s - self._planned.began_s if self._planned is not None else 0.0
        self._unlearned = _Unlearned(self._planned, committed, self._forward_s(forward), step_s)
        if self.speculates:
            self.observing.put_off(committed.verified)
        self._plan(committed, drafts)
        if not self.requests.table.request_of:
            self.learn()  # no forward follows, and the engine may go to sleep
        return self._uniform(forward, drafts)

    def learn(self) -> None:
        """Learn from the previous forward: while a device runs the next one, or at once."""
        if self._unlearned is None and not self.observing.waiting:
            return
        began_s = self.recorder.clock()
        with self.recorder.time("observe"):
            self.observing.hand_over_all()
            for speculator in self.speculators.values() if self.speculates else ():
                speculator.learn()
            self._count()
        self._beside_s += self.recorder.clock() - began_s

    def _settle(self) -> None:
        """Finish learning from the previous forward: requests, speculators or weights are about to change."""
        with self.recorder.time("observe"):
            self.observing.hand_over_all()
        self._count()

    # ------------------------------------------------------------------------------------------------------- following

    def _enter(self, forward: Forward, known: np.ndarray) -> None:
        """Make rows whose prompt is complete requests that drafters know; `known` as in `rows_of`."""
        requests = self.requests
        newcomers = requests.newcomers(forward, known)
        for row in newcomers:
            arrival, prompt = requests.arrival(forward, row)
            if arrival.request is None and arrival.sampling is not None and requests.table.is_over():
                self._end_epoch()
                if self.traffic.worth_learning(self.recorder.clock()):
                    self._refresh(self.tracker.version)
                self._begin_epoch(arrival.sampling)
            requests.table.enter(arrival, prompt)  # without a row, the request is served without drafts
        if self.speculates:
            self.proposing.compile_for_ways(forward.head_inputs.device)
        self._start([forward.batch.names[row] for row in newcomers], requests.prompts_of(forward, newcomers))

    def _start(self, names: list[str], prompts: Prompts) -> None:
        table = self.requests.table
        entered = [table.request_of[name] for name in names if name in table.request_of]
        if entered and self.speculates:
            for speculator in self.speculators.values():
                speculator.start(table.current, np.array(entered), prompts)

    def _end_epoch(self) -> None:
        """End an epoch of unannounced requests and make its rollouts available for learning."""
        table = self.requests.table
        if table.sequences is not None:
            table.sample_as(table.commonest_way)
            accepted = {
                name: right for name, (_, right) in self.recorder.draft_counts().items()
            }  # since the last report
            self.tracker.finished(Rollouts(table.sequences, self._busy_s() - self._epoch_mark_s, accepted))

    def _refresh(self, version: int | None) -> None:
        """Refresh the drafters from the newest epoch for policy `version`; None adds one to the version."""
        began_s = self.recorder.clock()
        self.tracker.advance(self.speculators, self.controller, version)
        now_s = self.recorder.clock()
        self.traffic.learned(now_s, now_s - began_s)

    def _begin_epoch(self, sampling: SamplingParams) -> None:
        """Begin an epoch of unannounced requests; running requests move into it."""
        table = self.requests.table
        table.open(sampling, self.tracker.version)
        self._planned, self._epoch_mark_s = None, self._busy_s()
        self._start(list(table.request_of), Prompts())

    def _busy_s(self) -> float:
        return self.recorder.seconds("forward") + self.recorder.seconds("prefill")

    def _count_ended(self, request: int) -> None:
        table = self.requests.table
        if not table.announced:
            prompt = int(table.current.prompt_lengths[request])
            self.traffic.ended(prompt, int(table.current.lengths[request]) - prompt)

    def _abandon(self, request: int) -> None:
        """Count a request that ended unseen as finished, without new tokens; a static head then frees its cache row.

        Drafters that log what tokens were drawn from have nothing to free, and expect states of every request.
        """
        one, none = np.array([request]), np.zeros(1, np.int64)
        ended = Verified(one, np.zeros((1, 0), np.int64), none, none, none, np.ones(1, bool))
        for speculator in self.speculators.values() if self.speculates else ():
            if not speculator.needs.head_inputs:
                speculator.observe(self.requests.table.current, ended)

    # ------------------------------------------------------------------------------------------------------- observing

    def _commit(self, forward: Forward) -> Committed | None:
        """Append what the forward settled, newcomers included; None if drafters know none of its requests."""
        requests, table = self.requests, self.requests.table
        known = requests.rows_of(forward.batch)
        requests.read_prompts(forward, known)
        committed = self._committed(forward, known, waits_for_newcomers=True)
        if committed is None:
            self._enter(forward, known)
            committed = self._committed(forward, requests.rows_of(forward.batch), waits_for_newcomers=False)
        assert committed is not None, "a pass that does not wait for newcomers commits"
        if not len(committed.rows):
            return None
        verified = committed.verified
        if len(committed.going) < len(committed.rows):
            for i in verified.finished.nonzero()[0].tolist():
                self._count_ended(verified.requests[i])
                table.leave(forward.batch.names[committed.rows[i]])
        return committed

    def _committed(self, forward: Forward, known: np.ndarray, *, waits_for_newcomers: bool) -> Committed | None:
        """See `commit_rows`. Reads the plan at the time of the call: newcomers may have begun another epoch."""
        planned = self._planned
        plan = NO_PLAN if planned is None else PlannedRows(planned.requests, planned.admission.lengths)
        return commit_rows(
            forward, known, self.requests.table, plan, self._max_draft_tokens, self.recorder,
            has_plan=planned is not None, waits_for_newcomers=waits_for_newcomers,
        )  # fmt: skip

    def _forward_s(self, forward: Forward) -> float:
        """Seconds of the forward."""
        mark_s, self._forward_mark_s = self._forward_mark_s, self.recorder.seconds("forward")
        beside_s, self._beside_s = self._beside_s, 0.0
        self.observing.is_hidden = works_beside_host = forward.head_inputs.device.type != "cpu"
        return self._forward_mark_s - mark_s + (beside_s if works_beside_host else 0.0)

    def _count(self) -> None:
        """Let the controller learn from the previous forward and count it. Never uses the device: weights may be asleep."""
        unlearned, self._unlearned = self._unlearned, None
        if unlearned is None or unlearned.planned is None:
            return
        planned, committed = unlearned.planned, unlearned.committed
        verified = committed.verified
        if committed.as_planned and self.speculates:
            # Draft tokens that the scheduler left out were not verified and cost nothing.
            admission = Admission(planned.admission.drafters, verified.num_drafted.copy())
            self.controller.observe(planned.step, admission, verified, unlearned.forward_s, unlearned.step_s)
        if len(committed.planned):
            self.num_due += asked_of(planned.admission.lengths[committed.planned])[1]
            drafters = planned.admission.drafters[committed.planned]
            account(
                self.recorder, self.controller, planned.step, verified, drafters, unlearned.forward_s, self._plain_costs,
                alone=committed.as_planned,
            )  # fmt: skip

    # -------------------------------------------------------------------------------------------------------- drafting

    def _plan(self, committed: Committed, drafts: list[list[int]]) -> None:
        """Plan and propose for the requests that continue; draft tokens go into `drafts`, by row."""
        requests, rows, room = committed.going, committed.going_rows, committed.room
        sequences, began_s = self.requests.table.current, self.recorder.clock()
        self._planned = None
        if not len(requests):
            return
        if self.speculates:
            with self.recorder.time("controller"):
                step = self.proposing.run(sequences, requests, room)
                admission = self.controller.admit(step)
                if admission.lengths.any():
                    self._take(
                        merge(step.drafts, list(self.speculators), admission, sequences.vocab_size), rows, drafts
                    )
        else:
            nothing = np.zeros(len(room), np.int64)
            step, admission = Step(room, int(sequences.lengths[requests].sum()), []), Admission(nothing, nothing.copy())
        self._planned = _Planned(step, admission, requests, began_s)

    def _take(self, draft: Draft, rows: np.ndarray, drafts: list[list[int]]) -> None:
        """Copy the draft of each of `rows` (int64 `[n]`) into `drafts`."""
        for row, tokens, length in zip(rows.tolist(), draft.token_ids.tolist(), draft.lengths.tolist(), strict=True):
            drafts[row] = tokens[:length]

    def _uniform(self, forward: Forward, drafts: list[list[int]]) -> list[list[int]]:
        """Drafts padded to equal length if every row decodes and vLLM's full graphs need that; else `drafts`."""
        if not forward.uniform or not forward.num_new.all():
            return drafts
        batch = forward.batch
        last_tokens = batch.token_ids[np.arange(len(drafts)), batch.lengths - 1]
        return uniform_drafts(drafts, last_tokens, self._max_length - 1 - batch.lengths, forward.uniform)
