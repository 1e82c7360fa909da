"""The decode loop: plan, propose, verify, commit, observe.

Rows of the attention cache `0 .. batch - 1` hold the active requests, in no particular order; `DecodeLoop.active[row]` is
the request in a row. Everything about a request but its cache row lives in `Sequences`, where nothing moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from atlas_rl.controller.base import Admission, Controller, Step
from atlas_rl.core import Draft, Hidden, Sequences, Verified
from atlas_rl.decode.propose import Proposing, merge
from atlas_rl.policy.base import Backend, Segments, Taps
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.sampling.verification import Outcome, Verifier
from atlas_rl.speculators.base import Speculator

PREFILL_TOKENS = 4096  # packed prompt tokens per forward: bounds the activations of a wave of long prompts


class DecodeLoop:
    """Generates every request of one call.

    Args:
        backend: Runs the policy; its session is open with at least `num_rows` rows.
        verifier: Turns logits and drafts into committed tokens.
        speculators: By name, in the controller's order; empty for plain decoding.
        controller: Plans each step; None for plain decoding.
        sequences: The requests, prompts in place.
        num_rows: Most requests decoded together; the others wait and are admitted in waves.
        max_lengths: int64 `[num_requests]`, prompt plus completion tokens at which a request ends.
        recorder: Gets counts and seconds.
    """

    def __init__(
        self,
        backend: Backend,
        verifier: Verifier,
        speculators: Mapping[str, Speculator],
        controller: Controller,
        sequences: Sequences,
        num_rows: int,
        max_lengths: np.ndarray,
        recorder: StepRecorder,
    ) -> None:
        self.backend = backend
        self.verifier = verifier
        self.speculators = speculators
        self.controller = controller
        self.sequences = sequences
        self.num_rows = num_rows
        self.recorder = recorder
        num_requests = len(sequences.lengths)
        self.logprobs: list[list[float]] = [[] for _ in range(num_requests)]
        self.active = np.zeros(0, np.int64)
        self.waiting = deque(range(num_requests))
        self.no_speculation_forward_s = 0.0
        self.proposing = Proposing(speculators, controller, recorder)
        self.trace: list[dict[str, Any]] = []  # of a controller that explains itself, one record per step
        self._names = list(speculators)
        self._limits = max_lengths
        for speculator in speculators.values():
            speculator.share_cache(backend, self.rows_of)

    def rows_of(self, requests: np.ndarray) -> np.ndarray:
        """Cache rows of active requests: int64 `[n]` for int64 `[n]`."""
        row_of = np.empty(len(self.sequences.lengths), np.int64)
        row_of[self.active] = np.arange(len(self.active))
        return row_of[requests]

    def run(self) -> None:
        """Decode until every request has ended."""
        with self.recorder.generating():
            while self.waiting or len(self.active):
                self.admit_waiting()
                if len(self.active):
                    self.step()

    def step(self) -> None:
        """One target forward over the active batch."""
        requests, began = self.active, self.recorder.clock()
        step = self._propose(requests)
        with self.recorder.time("controller"):
            admission = self.controller.admit(step)
            draft = merge(step.drafts, self._names, admission, self.backend.vocab_size)
        forward_s = -self.recorder.seconds("forward")
        with self.recorder.time("forward"):
            logits, hidden = self._forward(requests, draft)
        forward_s += self.recorder.seconds("forward")
        with self.recorder.time("sample"):
            outcome = self.verifier.verify(logits, draft, self.sequences, requests)
        with self.recorder.time("commit"):
            verified = self.commit(requests, outcome, draft.lengths)
            verified.hidden = hidden
        with self.recorder.time("observe"):
            step_s = self.recorder.clock() - began
            record = self.controller.observe(step, admission, verified, forward_s, step_s)
            if record is not None:
                self.trace.append(record | {"step_s": step_s})
            self._observe(verified)
        with self.recorder.time("commit"):
            self._account(step, verified, admission, forward_s)
            self._retire(verified.finished)

    def _propose(self, requests: np.ndarray) -> Step:
        lengths = self.sequences.lengths[requests]
        ready = [name for name, speculator in self.speculators.items() if speculator.ready]
        room = self._limits[requests] - lengths - 1
        step = Step(room, int(lengths.sum()), ready, drawn_as=self.sequences.sampling.distribution)
        self.proposing.run(step, self.sequences, requests)
        return step

    def _forward(self, requests: np.ndarray, draft: Draft) -> tuple[torch.Tensor, Hidden | None]:
        """Logits and hidden states of the last committed token and of every draft token of each request, packed."""
        lengths = draft.lengths + 1
        starts = self.sequences.lengths[requests] - 1
        tokens = np.empty(int(lengths.sum()), np.int64)
        first = np.cumsum(lengths) - lengths
        tokens[first] = self.sequences.token_ids[requests, starts]
        row, position = np.nonzero(np.arange(draft.token_ids.shape[1])[None] < draft.lengths[:, None])
        tokens[first[row] + 1 + position] = draft.token_ids[row, position]
        taps = self._taps()
        logits = self.backend.forward(Segments(tokens, 0, starts, lengths), np.arange(len(tokens)), taps)
        self.backend.synchronize()
        return logits, Hidden(first, taps.last, taps.layers) if taps else None

    def _taps(self) -> Taps | None:
        """What the speculators want to see of the next forward."""
        wants_last = any(speculator.reads_hidden for speculator in self.speculators.values())
        wants_layers = sorted({layer for speculator in self.speculators.values() for layer in speculator.reads_layers})
        return Taps(wants_last, tuple(wants_layers)) if wants_last or wants_layers else None

    def commit(self, requests: np.ndarray, outcome: Outcome, num_drafted: np.ndarray) -> Verified:
        """Append what verification settled, up to an ending token, and say which requests end."""
        sequences = self.sequences
        num_committed = outcome.num_accepted + 1
        ends = sequences.sampling.ends(outcome.token_ids)
        ends &= np.arange(ends.shape[1])[None] < num_committed[:, None]
        stopped = ends.any(axis=1)
        num_committed[stopped] = ends[stopped].argmax(axis=1) + 1
        for row, request in enumerate(requests):
            length, count = sequences.lengths[request], num_committed[row]
            sequences.token_ids[request, length : length + count] = outcome.token_ids[row, :count]
            self.logprobs[request].extend(outcome.logprobs[row, :count].tolist())
        sequences.lengths[requests] += num_committed
        finished = stopped | (sequences.lengths[requests] >= self._limits[requests])
        counted = np.arange(ends.shape[1])[None] < num_committed[:, None]
        self.recorder.distribution(
            entropy_sum=float(outcome.entropies[counted].sum()),
            max_prob_sum=float(outcome.max_probs[counted].sum()),
            num_tokens=int(num_committed.sum()),
        )
        accepted = np.minimum(outcome.num_accepted, num_committed)
        # Drafts behind an accepted ending token were neither accepted nor rejected.
        cut = outcome.num_accepted >= num_committed
        num_drafted = np.where(cut, accepted, num_drafted)
        return Verified(requests, outcome.token_ids, num_committed, accepted, num_drafted, finished)

    def _observe(self, verified: Verified) -> None:
        for speculator in self.speculators.values():
            speculator.observe(self.sequences, verified)

    def _account(self, step: Step, verified: Verified, admission: Admission, forward_s: float) -> None:
        drafted = verified.num_drafted if self._names else None
        self.recorder.forward(
            num_committed=verified.num_committed,
            num_drafted=drafted,
            num_accepted=verified.num_accepted if self._names else None,
            arms=admission.arms if self._names else None,
        )
        plain_s = forward_s
        if admission.lengths.any():
            plain_s = self.controller.plain_forward_s(step.batch, step.context_tokens) or forward_s
        # Plain decoding needs one forward of this batch for every token per request that this step committed.
        self.no_speculation_forward_s += plain_s * float(verified.num_committed.mean())

    def _retire(self, finished: np.ndarray) -> None:
        lengths = self.sequences.lengths
        self.active = retire(self.active, finished, lambda r: int(lengths[r]) - 1, self.backend)

    def admit_waiting(self) -> None:
        """Fill free rows with waiting requests: one prefill per unique prompt, its cache copied to the group."""
        free = self.num_rows - len(self.active)
        # A prefill holds up everybody: wait until a quarter of the rows is free, unless nothing else is running.
        if not self.waiting or (len(self.active) and free < max(1, self.num_rows // 4)):
            return
        wave = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        groups: dict[int, list[int]] = {}
        for request in wave:
            groups.setdefault(self._prompt_group(request, groups), []).append(request)
        leaders = np.array(list(groups), np.int64)
        followers = [request for group in groups.values() for request in group[1:]]
        first_row = len(self.active)
        requests = np.concatenate([leaders, np.array(followers, np.int64)])
        with self.recorder.time("prefill"):
            logits, hidden = self._prefill(leaders, first_row)
            row = first_row + len(leaders)
            for index, (leader, group) in enumerate(groups.items()):
                targets = list(range(row, row + len(group) - 1))
                row += len(targets)
                if targets:
                    self.backend.copy_rows(first_row + index, targets, int(self.sequences.prompt_lengths[leader]))
            self.backend.synchronize()
        with self.recorder.time("observe"):
            for speculator in self.speculators.values():
                speculator.start(self.sequences, requests)
                if hidden is not None and speculator.reads_layers:
                    speculator.read_prompts(self.sequences, [np.array(group) for group in groups.values()], hidden)
        self._first_tokens(requests, logits, hidden, groups)

    def _first_tokens(
        self, requests: np.ndarray, logits: torch.Tensor, hidden: Hidden | None, groups: Mapping[int, list[int]]
    ) -> None:
        """Draw each request's first token from its prompt's logits and let it into the batch."""
        leader_of = {request: index for index, group in enumerate(groups.values()) for request in group}
        index = np.array([leader_of[int(request)] for request in requests])
        draft = Draft.empty(len(requests))
        with self.recorder.time("sample"):
            drawn_from = logits[torch.from_numpy(index).to(logits.device)]
            outcome = self.verifier.verify(drawn_from, draft, self.sequences, requests)
        with self.recorder.time("commit"):
            verified = self.commit(requests, outcome, draft.lengths)
            if hidden is not None:
                ends = hidden.first + self.sequences.prompt_lengths[list(groups)] - 1
                verified.hidden = Hidden(index, hidden.last, {n: states[ends] for n, states in hidden.layers.items()})
        with self.recorder.time("observe"):
            self._observe(verified)
        with self.recorder.time("commit"):
            veterans = len(self.active)
            self.active = np.concatenate([self.active, requests])
            self._retire(np.concatenate([np.zeros(veterans, bool), verified.finished]))

    def _prefill(self, leaders: np.ndarray, first_row: int) -> tuple[torch.Tensor, Hidden | None]:
        """Fill the cache with one prompt per row.

        Returns:
            float32 logits after each prompt's last token `[leaders, vocab]`, and hidden states: of the last tokens only
            for the LM head's input, of all tokens for the layers.
        """
        sequences, logits, caught = self.sequences, [], []
        prompt_lengths = sequences.prompt_lengths[leaders]
        for chunk in _chunks(prompt_lengths, PREFILL_TOKENS):
            requests, lengths = leaders[chunk], prompt_lengths[chunk]
            tokens = np.concatenate([sequences.token_ids[r, :n] for r, n in zip(requests, lengths, strict=True)])
            segments = Segments(tokens.astype(np.int64), first_row + chunk.start, np.zeros_like(lengths), lengths)
            taps = self._taps()
            logits.append(self.backend.forward(segments, np.cumsum(lengths) - 1, taps))
            caught += [taps] if taps else []
        if not caught:
            return torch.cat(logits), None
        last = torch.cat([taps.last for taps in caught if taps.last is not None]) if caught[0].wants_last else None
        layers = {layer: torch.cat([taps.layers[layer] for taps in caught]) for layer in caught[0].wants_layers}
        return torch.cat(logits), Hidden(np.cumsum(prompt_lengths) - prompt_lengths, last, layers)

    def _prompt_group(self, request: int, groups: Mapping[int, list[int]]) -> int:
        """The request that leads this one's group: the first in the wave with the same prompt, or itself."""
        sequences = self.sequences
        length = sequences.prompt_lengths[request]
        for leader in groups:
            if sequences.prompt_keys[leader] == sequences.prompt_keys[request] and np.array_equal(
                sequences.token_ids[leader, : sequences.prompt_lengths[leader]], sequences.token_ids[request, :length]
            ):
                return leader
        return request


def retire(active: np.ndarray, finished: np.ndarray, cached: Callable[[int], int], backend: Backend) -> np.ndarray:
    """Drop finished rows and move the last rows into the gaps, so that the long tail runs as a small batch.

    Args:
        active: int64 `[batch]`, the request in each cache row.
        finished: bool `[batch]`.
        cached: Cached tokens of a request, which move with it.
        backend: Its session is open.

    Returns:
        int64 `[batch - finished]`, the request in each row now.
    """
    kept = int((~finished).sum())
    remaining = active.copy()
    gaps = np.flatnonzero(finished[:kept])
    movers = np.flatnonzero(~finished[kept:]) + kept
    for gap, mover in zip(gaps, movers, strict=True):
        backend.copy_rows(int(mover), [int(gap)], cached(int(active[mover])))
        remaining[gap] = active[mover]
    return remaining[:kept]


def _chunks(lengths: np.ndarray, budget: int) -> list[slice]:
    """Consecutive slices whose lengths add up to at most `budget`, at least one item each."""
    chunks, begin, total = [], 0, 0
    for index, length in enumerate(lengths):
        if index > begin and total + length > budget:
            chunks.append(slice(begin, index))
            begin, total = index, 0
        total += int(length)
    chunks.append(slice(begin, len(lengths)))
    return chunks
