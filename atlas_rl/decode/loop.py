"""The decode loop: plan, propose, verify, commit, observe.

Rows of the attention cache `0 .. batch - 1` hold the active requests, in no particular order; `DecodeLoop.active[row]` is
the request in a row. Everything about a request but its cache row lives in `Sequences`, where nothing moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from atlas_rl.controller.base import Admission, Controller, Rest, Step
from atlas_rl.core import Draft, Hidden, Needs, Prompts, Sequences, Verified
from atlas_rl.decode.ahead import DraftsAhead
from atlas_rl.decode.commit import Settled, account, commit
from atlas_rl.decode.observing import Observing
from atlas_rl.decode.plain_run import PlainCosts
from atlas_rl.decode.propose import Proposing, merge
from atlas_rl.decode.room import CacheRoom, rest_of
from atlas_rl.decode.settling import reached
from atlas_rl.decode.stand_ins import run_one_by_one, stand_in
from atlas_rl.policy.base import PolicyCache, PolicyRunner, Segments, Taps, retire, roomy
from atlas_rl.policy.logits import NonFiniteLogits
from atlas_rl.policy.step_tail import StepTail
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.sampling.packing import packed_tokens
from atlas_rl.sampling.verification import Outcome, Verifier
from atlas_rl.speculators.base import Speculator

_PAUSED = (
    "memory for the attention cache ran short: {} times a request gave its row up and was run again later. Lower "
    "max_batch_size, or leave more memory free"
)
_NONE = np.zeros(0, np.int64)
PREFILL_TOKENS = 4096  # packed prompt tokens per forward: bounds the activations of a wave of long prompts


@dataclass(slots=True)
class _Run:
    """A step that has run but has not been learned from yet.

    Attributes:
        step: The planned step, with its drafts.
        admission: Which drafts were verified.
        verified: Outcome of the step.
        forward_s: Seconds of the forward. Work that is done once (`DecodeLoop.once_s`) is left out of both.
        step_s: Seconds from the previous outcome to this one: the time of a step, without host work hidden by the
            device.
    """

    step: Step
    admission: Admission
    verified: Verified
    forward_s: float
    step_s: float


class DecodeLoop:
    """Generates every request of one call.

    Args:
        runner: Runs the policy; its session is open, over a cache for at least `num_rows` rows.
        verifier: Turns logits and drafts into committed tokens.
        speculators: By name, in the controller's order; empty for plain decoding.
        controller: Plans each step; None for plain decoding.
        sequences: The requests, prompts in place.
        num_rows: Most requests decoded together, as far as memory allows; the others wait and are admitted in waves.
        max_lengths: int64 `[num_requests]`, prompt plus completion tokens at which a request ends.
        recorder: Receives counts and seconds.
    """

    def __init__(
        self,
        runner: PolicyRunner,
        verifier: Verifier,
        speculators: Mapping[str, Speculator],
        controller: Controller,
        sequences: Sequences,
        num_rows: int,
        max_lengths: np.ndarray,
        recorder: StepRecorder,
    ) -> None:
        self.runner = runner
        self.verifier = verifier
        self.speculators = speculators
        self.controller = controller
        self.sequences = sequences
        self.recorder = recorder
        num_requests = len(sequences.lengths)
        self._logprobs = np.zeros((num_requests, 0), np.float32)  # by place in the completion
        self.active = np.zeros(0, np.int64)
        self.room = CacheRoom(runner, sequences, max_lengths, num_rows)
        self.max_lengths = max_lengths
        self.plain_costs = PlainCosts()
        self._at_once = tuple(one for one in speculators.values() if not one.observes_late)
        late = {name: one for name, one in speculators.items() if one.observes_late}
        self.observing = Observing(late, lambda one, seen: one.observe(sequences, seen), runner.works_beside_host)
        self.ahead = DraftsAhead.of(speculators, controller, recorder, runner, verifier, sequences.sampling)
        self.proposing = Proposing(speculators, controller, recorder, self.observing, self.ahead)
        self.trace: list[dict[str, Any]] = []  # the controller's records, one per step, if it keeps any
        self._names = list(speculators)
        self._needs = Needs.of(speculator.needs for speculator in speculators.values())
        self._cache = PolicyCache(runner, self.rows_of)
        self._unlearned: _Run | None = None
        self._told_sizes: tuple[int, ...] | None = None  # what the controller was told in this call
        self._arrived_s = 0.0  # time of the newest outcome, less `once_s` until then

    @property
    def logprobs(self) -> list[list[float]]:
        """Logprobs of each request's completion tokens so far, under the processed distribution."""
        counts = self.sequences.lengths - self.sequences.prompt_lengths
        return [row[:count].tolist() for row, count in zip(self._logprobs, counts, strict=True)]

    @property
    def once_s(self) -> float:
        """Seconds so far of work that is done once, by forwards and by drafts that are queued behind them."""
        return self.runner.once_s + self.ahead.once_s

    def rows_of(self, requests: np.ndarray) -> np.ndarray:
        """Cache rows of active requests: int64 `[n]` in, int64 `[n]` out."""
        row_of = np.empty(len(self.sequences.lengths), np.int64)
        row_of[self.active] = np.arange(len(self.active))
        return row_of[requests]

    def run(self) -> None:
        """Decode until every request has ended."""
        with self.recorder.generating():
            while self.room.waiting or len(self.active):
                if self.room.waiting:
                    self.admit_waiting()
                if len(self.active):
                    self.step()
            self._learn()
        if self.room.num_paused:
            self.recorder.warn(_PAUSED.format(self.room.num_paused))

    def step(self) -> None:
        """One target forward over the active batch.

        The device waits for everything that comes before the forward, so only what the forward needs comes there.
        Learning from a step happens while the device runs the next one.
        """
        recorder = self.recorder
        self._tell_sizes()
        self.active = requests = self.room.go_on(self.active)
        with recorder.time("controller"):
            step = self.proposing.run(self.sequences, requests, self.room.drafts(requests), self._rest(requests))
            admission = self.controller.admit(step)
            draft = merge(step.drafts, self._names, admission, self.runner.vocab_size)
            asked_s, once_s = recorder.switch("forward"), self.once_s
            step.exposed_s += asked_s - once_s - self._arrived_s
            tail = self.verifier.tail(draft, self.sequences, requests)
            logits, hidden = self.forward(requests, draft, tail)
            recorder.switch("sample")
            begun = self.verifier.begin(logits, draft, self.sequences, requests, tail)
            apart_s = self._learn()
            if self.ahead.names:
                self.ahead.queue(step, self.sequences, requests, begun.decided, hidden)
            recorder.switch("forward")
            self.runner.synchronize()
            forward_s = recorder.switch("sample") - asked_s - (0.0 if self.runner.works_beside_host else apart_s)
            forward_s = max(0.0, forward_s - (self.once_s - once_s))
            try:
                outcome = begun.finish()
            except NonFiniteLogits:  # the drafts' fault, or the policy's own
                recorder.switch("forward")
                self.ahead.drop()
                again = run_one_by_one(
                    self.runner, self.sequences, requests, draft, logits, hidden, self._taps,
                    everyone=not self.verifier.keeps_logits(self.sequences.sampling),
                )  # fmt: skip
                if again is None:
                    raise
                recorder.switch("sample")
                logits, hidden = again
                outcome = self.verifier.verify(logits, draft, self.sequences, requests)
            began_s, self._arrived_s = self._arrived_s, recorder.switch("commit") - self.once_s
            verified = self.commit(requests, outcome, draft.lengths, hidden)
            self._observe(verified)
            self._retire(verified.finished)
        self._unlearned = _Run(step, admission, verified, forward_s, max(0.0, self._arrived_s - began_s))

    def _tell_sizes(self) -> None:
        """Tell the controller what forwards are padded to, whenever that has changed.

        Known while requests are active: their prompts have run, and nothing is padded before.
        """
        sizes = self.runner.step_sizes
        if sizes != self._told_sizes:
            self._told_sizes = sizes
            self.controller.forwards_are_padded(sizes)

    def _learn(self) -> float:
        """Learn from the previous step and count it; returns the seconds that this took."""
        began_s, run = self.recorder.clock(), self._unlearned
        self._unlearned = None
        with self.recorder.time("observe"):
            self.observing.hand_over_all()
            for speculator in self.speculators.values():
                speculator.learn()
            if run is not None:
                record = self.controller.observe(run.step, run.admission, run.verified, run.forward_s, run.step_s)
                if record is not None:
                    self.trace.append(record | {"step_s": run.step_s})
                account(
                    self.recorder, self.controller, run.step, run.verified, run.admission.drafters, run.forward_s,
                    self.plain_costs,
                )  # fmt: skip
        return self.recorder.clock() - began_s

    def forward(self, requests: np.ndarray, draft: Draft, tail: StepTail | None = None) -> tuple[torch.Tensor, Hidden]:
        """Run the policy over the last committed token and every draft token of each request, packed.

        `tail` may run with it, unless some of the logits are not the policy's.

        Returns:
            float32 logits `[sum(draft.lengths + 1), vocab]`, and hidden states at the same positions.
        """
        sequences = self.sequences
        tokens, first, starts, lengths = packed_tokens(
            requests, sequences.token_ids, sequences.lengths, draft.token_ids, draft.lengths
        )
        unrunnable = self.runner.unrunnable() if tokens.size > requests.size else None
        unknown = _NONE if unrunnable is None else stand_in(tokens, lengths, unrunnable)
        taps = self._taps()
        tail = None if unknown.size else tail
        logits = self.runner.forward(Segments(tokens, 0, starts, lengths), np.arange(tokens.size), taps, tail)
        if unknown.size:
            logits[torch.from_numpy(unknown).to(logits.device)] = float("nan")
        return logits, Hidden(first, taps.head_inputs, taps.layers)

    def _rest(self, requests: np.ndarray) -> Rest:
        """Tokens that active requests have generated, and tokens until their limits."""
        sequences = self.sequences
        generated, left = rest_of(requests, sequences.lengths, sequences.prompt_lengths, self.max_lengths)
        return Rest(requests, generated, left, len(self.room.waiting))

    def _taps(self) -> Taps:
        """Hidden states that the speculators need from the next forward."""
        return Taps(self._needs.head_inputs, self._needs.layers)

    def commit(self, requests: np.ndarray, outcome: Outcome, num_drafted: np.ndarray, hidden: Hidden) -> Verified:
        """Append the tokens that verification settled, with their logprobs."""
        sequences, num_tokens = self.sequences, outcome.num_accepted + 1
        settled = Settled(
            requests, outcome.token_ids, num_tokens, num_drafted, outcome.entropies, outcome.max_probs, hidden,
            outcome.logprobs,
        )  # fmt: skip
        text, completion = reached(requests, num_tokens, sequences.lengths, self.max_lengths, sequences.prompt_lengths)
        sequences.reserve(text)
        if completion > self._logprobs.shape[1]:
            self._logprobs = np.pad(self._logprobs, ((0, 0), (0, roomy(completion) - self._logprobs.shape[1])))
        return commit(settled, sequences, self.max_lengths, self.recorder, logprobs=self._logprobs)

    def _observe(self, verified: Verified) -> None:
        """Pass an outcome to the speculators, inside `recorder.time("commit")`; see `Speculator.observes_late`."""
        if self._at_once:
            self.recorder.switch("observe")
            for speculator in self._at_once:
                speculator.observe(self.sequences, verified)
            self.recorder.switch("commit")
        self.observing.put_off(verified)

    def _retire(self, finished: np.ndarray) -> None:
        lengths = self.sequences.lengths
        self.active = retire(self.active, finished, lambda r: int(lengths[r]) - 1, self.runner)

    def admit_waiting(self) -> None:
        """Fill free rows with waiting requests."""
        wave = self.room.wave(self.active)
        begun = self.sequences.lengths[wave] > self.sequences.prompt_lengths[wave]
        if not begun.all():
            self._begin(wave[~begun])
        if begun.any():
            self._resume(wave[begun])

    def _begin(self, wave: np.ndarray) -> None:
        """Admit requests, int64 `[n]`: prefill each unique prompt, copy its cache to the group, draw first tokens."""
        groups: dict[int, list[int]] = {}
        for request in wave.tolist():
            groups.setdefault(self._prompt_group(request, groups), []).append(request)
        leaders = np.array(list(groups), np.int64)
        followers = [request for group in groups.values() for request in group[1:]]
        first_row = len(self.active)
        requests = np.concatenate([leaders, np.array(followers, np.int64)])
        with self._prefilling(wave) as ended:
            logits, hidden = self.prefill(leaders, first_row)
            row = first_row + len(leaders)
            for index, (leader, group) in enumerate(groups.items()):
                targets = list(range(row, row + len(group) - 1))
                row += len(targets)
                if targets:
                    self.runner.copy_rows(first_row + index, targets, int(self.sequences.prompt_lengths[leader]))
        if not ended:
            return
        with self.recorder.time("observe"):
            self.observing.hand_over_all()
            prompts = Prompts([np.array(group) for group in groups.values()], hidden) if hidden.layers else Prompts()
            for speculator in self.speculators.values():
                speculator.start(self.sequences, requests, prompts, self._cache)
        self._first_tokens(requests, logits, hidden, groups)

    def _resume(self, wave: np.ndarray) -> None:
        """Admit paused requests, int64 `[n]`: rerun their tokens except the last."""
        with self._prefilling(wave) as ended:
            for segments in self._texts(wave, self.sequences.lengths[wave] - 1, len(self.active)):
                self.runner.forward(segments, np.cumsum(segments.lengths) - 1)
        if ended:
            self.active = np.concatenate([self.active, wave])
            self._arrived_s = self.recorder.clock() - self.once_s

    @contextmanager
    def _prefilling(self, wave: np.ndarray) -> Iterator[list[bool]]:
        """Context of a prefill: if it gets no memory, its requests wait again.

        Speculators do not know these requests yet, so nothing else has to be undone.
        """
        ended: list[bool] = []
        try:
            with self.recorder.time("prefill"):
                yield ended
                self.runner.synchronize()
            self.room.admitted(len(self.active) + len(wave))
            ended.append(True)
        except MemoryError:
            if not self.room.take_back(wave, self.active):
                raise

    def _first_tokens(
        self, requests: np.ndarray, logits: torch.Tensor, hidden: Hidden, groups: Mapping[int, list[int]]
    ) -> None:
        """Draw each request's first token from its prompt's logits and add it to the batch."""
        leader_of = {request: index for index, group in enumerate(groups.values()) for request in group}
        index = np.array([leader_of[int(request)] for request in requests])
        draft = Draft.empty(len(requests))
        with self.recorder.time("sample"):
            first_logits = logits[torch.from_numpy(index).to(logits.device)]
            outcome = self.verifier.verify(first_logits, draft, self.sequences, requests)
        with self.recorder.time("commit"):
            ends = hidden.starts + self.sequences.prompt_lengths[list(groups)] - 1
            drawn_from = Hidden(index, hidden.head_inputs, {n: states[ends] for n, states in hidden.layers.items()})
            verified = self.commit(requests, outcome, draft.lengths, drawn_from)
            self._observe(verified)
            veterans = len(self.active)
            self.active = np.concatenate([self.active, requests])
            self._retire(np.concatenate([np.zeros(veterans, bool), verified.finished]))
        self._arrived_s = self.recorder.clock() - self.once_s

    def prefill(self, leaders: np.ndarray, first_row: int) -> tuple[torch.Tensor, Hidden]:
        """Fill the cache with one prompt per row.

        Returns:
            float32 logits after each prompt's last token `[leaders, vocab]`, and hidden states: head inputs of the last
            tokens only `[leaders, hidden]`, layers of all tokens.
        """
        logits, caught = [], []
        prompt_lengths = self.sequences.prompt_lengths[leaders]
        for segments in self._texts(leaders, prompt_lengths, first_row):
            taps = self._taps()
            logits.append(self.runner.forward(segments, np.cumsum(segments.lengths) - 1, taps))
            caught.append(taps)
        head_inputs = torch.cat([taps.head_inputs for taps in caught])
        layers = {layer: torch.cat([taps.layers[layer] for taps in caught]) for layer in self._needs.layers}
        return torch.cat(logits), Hidden(np.cumsum(prompt_lengths) - prompt_lengths, head_inputs, layers)

    def _texts(self, requests: np.ndarray, lengths: np.ndarray, first_row: int) -> Iterator[Segments]:
        """The first `lengths` tokens (int64 `[n]`) of requests (int64 `[n]`) for rows from `first_row` on, in parts."""
        for chunk in _chunks(lengths):
            counts = lengths[chunk]
            texts = [self.sequences.token_ids[r, :n] for r, n in zip(requests[chunk], counts, strict=True)]
            tokens = np.concatenate(texts).astype(np.int64)
            yield Segments(tokens, first_row + chunk.start, np.zeros_like(counts), counts, settled=counts)

    def _prompt_group(self, request: int, groups: Mapping[int, list[int]]) -> int:
        """Index of the request that leads this one's group: the first in the wave with the same prompt, or itself."""
        sequences = self.sequences
        length = sequences.prompt_lengths[request]
        for leader in groups:
            if sequences.prompt_keys[leader] == sequences.prompt_keys[request] and np.array_equal(
                sequences.token_ids[leader, : sequences.prompt_lengths[leader]], sequences.token_ids[request, :length]
            ):
                return leader
        return request


def _chunks(lengths: np.ndarray) -> list[slice]:
    """Consecutive slices whose lengths add up to at most `PREFILL_TOKENS`, at least one item each."""
    chunks, begin, total = [], 0, 0
    for index, length in enumerate(lengths):
        if index > begin and total + length > PREFILL_TOKENS:
            chunks.append(slice(begin, index))
            begin, total = index, 0
        total += int(length)
    chunks.append(slice(begin, len(lengths)))
    return chunks
