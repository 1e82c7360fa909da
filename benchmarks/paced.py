"""A decode loop over a simulated device (`virtual_device.py`): real host code, forwards in the planner's predicted time.

Tokens and hidden states come from a recorded call. A recurrent head's drafts come from its own network, run outside of
time and remembered. Both depend on the prefix alone, so acceptance is real.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from atlas_kernels.verify import Verification
from atlas_rl.controller.base import Controller
from atlas_rl.core import Draft, Hidden, Sequences
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.planner.roofline import forward
from atlas_rl.planner.speculation import Setting
from atlas_rl.policy.base import Segments, Taps
from atlas_rl.policy.step_graphs import SIZES
from atlas_rl.policy.step_tail import StepTail
from atlas_rl.replay.record import Recorded
from atlas_rl.replay.replay import NoRunner, head_inputs_at, unfinished
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.sampling.by_kernels import FusedVerifier
from atlas_rl.sampling.verification import DrafterInvariant, Outcome, Verifying
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.recurrent.head import RecurrentHead
from benchmarks.virtual_device import Device

VERIFY_S, VERIFY_ROW_S = 30e-6, 2.0e-6
"""Device seconds of verification, fixed and per row of 151,936 logits: docs/gpu.md, measured on an H100."""

_SIZE_OF = [next(size for size in SIZES if size >= count) for count in range(SIZES[-1] + 1)]
_FLOAT32 = 1 / 16  # float32 products have this share of a GPU's rate for bfloat16: no tensor core has the type


def verify_s(num_rows: int) -> float:
    """Device seconds of verification."""
    return VERIFY_S + VERIFY_ROW_S * num_rows


class Costs:
    """Seconds of forwards of one setting, from the planner's roofline.

    Args:
        setting: The policy, its recurrent drafter and the machine; `context` is added to the recorded texts.
        padded: Token counts that a decode forward is padded to, ascending; empty if it is not padded.
    """

    def __init__(self, setting: Setting, padded: tuple[int, ...] = ()) -> None:
        self._setting, self.padded = setting, padded
        self._known: dict[tuple[int, int, int], float] = {}
        self._drafts: dict[int, float] = {}

    def forward_s(self, batch: int, num_tokens: int, context_tokens: int) -> float:
        """Seconds of a forward over `num_tokens` of `batch` requests with `context_tokens` in total."""
        setting, mean = self._setting, context_tokens // batch // 16 * 16
        key = batch, num_tokens, mean
        if key not in self._known:
            self._known[key] = forward(
                setting.model,
                setting.precision,
                setting.machine,
                batch=batch,
                tokens=num_tokens / batch,  # type: ignore[arg-type]  # rows are ragged
                context=setting.context + mean,
            ).total_s
        return self._known[key]

    def step_s(self, batch: int, num_tokens: int, context_tokens: int) -> float:
        """`forward_s` of a decode step. If it is padded, every token, padding included, reads a row of the cache.

        Tokens of one row may find it in the device's cache, which is not modelled.
        """
        if not self.padded or num_tokens > self.padded[-1]:
            return self.forward_s(batch, num_tokens, context_tokens)
        size = next(size for size in self.padded if size >= num_tokens)
        return self.forward_s(size, size, context_tokens // batch * size)

    def draft_s(self, batch: int, depth: int) -> float:
        """Seconds of a draft of the recurrent head."""
        if batch not in self._drafts:
            step = self._setting.draft_step(batch)
            assert step is not None, "a pace setting has a drafter"
            self._drafts[batch] = step.total_s
        return depth * self._drafts[batch]

    def fold_s(self, head: RecurrentHead) -> float:
        """Seconds of folding a recurrent head: two float32 products over its vocabulary, bound by arithmetic."""
        gates, outputs = head.cell.weight_ih, head.write.weight
        flops = 2 * len(head.outputs) * (gates.numel() + head.embed.weight.numel() + outputs.numel())
        return flops / (_FLOAT32 * self._setting.machine.gpu.flops_per_s["bf16"])

    def tables_s(self, head: RecurrentHead) -> float:
        """Seconds of reading the policy's tables for a recurrent head: gathered, converted, normed and written."""
        num_bytes = head.inputs.nbytes + head.outputs.nbytes
        return 6 * num_bytes / self._setting.machine.gpu.bandwidth_bytes_per_s


class PacedRunner(NoRunner):
    """Answers forwards from a record, in the device's time, and verification that belongs to them."""

    def __init__(self, recorded: Recorded, device: Device, costs: Costs, verifier: PacedVerifier) -> None:
        super().__init__(recorded.sequences.vocab_size)
        self.verifier = verifier
        self.loop: PacedLoop
        self.recorded, self._device, self._costs = recorded, device, costs
        self._ready_s = 0.0

    def forward(
        self, segments: Segments, keep: np.ndarray, taps: Taps | None = None, tail: StepTail | None = None
    ) -> torch.Tensor:
        device = self._device
        tail = tail if keep.size <= SIZES[-1] else None
        inputs = None if tail is None else tail.inputs(_SIZE_OF[keep.size])
        with device.outside():
            requests, lengths = self.loop.active, segments.lengths
            if taps is not None and taps.wants_head_inputs:
                row = np.repeat(np.arange(len(requests)), lengths)
                offset = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
                taps.head_inputs = self.loop.drawn_from(requests[row], segments.starts[row] + 1 + offset)
            seconds = self._costs.step_s(len(lengths), len(keep), int(segments.starts.sum()))
            if tail is not None:
                self.verifier.requests = requests
                tail.result = tail.run(torch.empty(0), torch.from_numpy(inputs))
                seconds += verify_s(len(keep))
        device.forward(seconds)
        self._ready_s = device.ready_s
        return torch.empty(0)

    @property
    def works_beside_host(self) -> bool:
        return True

    @property
    def step_sizes(self) -> tuple[int, ...]:
        return self._costs.padded

    def copy_rows(self, source: int, targets: Any, length: int) -> None:
        self._device.submit(0.0)

    def synchronize(self) -> None:
        self._device.wait(self._ready_s)


class PacedVerifier(FusedVerifier):
    """Verification as on a GPU, with the kernel's results taken from the record.

    Attributes:
        requests: int64 `[batch]`, the requests that are verified.
    """

    def __init__(self, recorded: Recorded, device: Device) -> None:
        super().__init__(DrafterInvariant(), "reference")
        self._true, self._device = recorded.sequences, device
        self.requests = np.zeros(0, np.int64)

    def begin(
        self,
        logits: torch.Tensor,
        draft: Draft,
        sequences: Sequences,
        requests: np.ndarray,
        tail: StepTail | None = None,
    ) -> Verifying:
        self.requests = requests
        begun = super().begin(logits, draft, sequences, requests, tail)
        self._device.submit(0.0)  # the download
        finish, ready_s = begun.finish, self._device.ready_s

        def outcome() -> Outcome:
            self._device.wait(ready_s)
            return finish()

        begun.finish = outcome
        return begun

    def _launch(self, rows: list[torch.Tensor], probs: torch.Tensor | None, temperature: float) -> Verification:
        """The record's results; charged here, unless a forward has taken verification along."""
        device, true = self._device, self._true
        apart = not device.num_outside
        with device.outside():
            _, drafts, starts, _, positions = (tensor.numpy() for tensor in rows)
            size, num_requests, starts = len(drafts), len(starts) - 1, starts[: len(self.requests) + 1]
            total = int(starts[-1])  # less than the size if padded
            drafts, positions, counts = drafts[:total], positions[:total], np.diff(starts)
            request = np.repeat(self.requests, counts)
            inside = np.minimum(positions, true.lengths[request] - 1)
            tokens = true.token_ids[request, inside].astype(np.int64)
            stands = (tokens == drafts) & (positions < true.lengths[request])
            wrong = np.cumsum(~stands)
            before = wrong - ~stands - np.repeat(np.append(0, wrong)[starts[:-1]], counts)
            accepted = np.add.reduceat((stands & (before == 0)).astype(np.int64), starts[:-1])
            tokens = np.pad(tokens, (0, size - total))
            accepted = np.pad(accepted, (0, num_requests - len(accepted)))
            figures = torch.full((size,), 0.5)
            verified = Verification(torch.from_numpy(tokens), torch.from_numpy(accepted), figures, figures, figures)
        if apart:
            device.submit(verify_s(total), calls=4)  # an upload, two kernels, and packing the results
        return verified


class PacedLoop(DecodeLoop):
    """The decode loop over a recorded call, in the device's time.

    Attributes:
        steps: The host's seconds without waits, per step and phase.
    """

    def __init__(
        self,
        recorded: Recorded,
        speculators: Mapping[str, Speculator],
        controller: Controller,
        costs: Costs,
    ) -> None:
        self.device = Device()
        sequences, max_lengths = unfinished(recorded)
        recorder = StepRecorder(speculators=tuple(speculators), clock=self.device.clock)
        verifier = PacedVerifier(recorded, self.device)
        runner = PacedRunner(recorded, self.device, costs, verifier)
        num_rows = len(max_lengths)
        super().__init__(runner, verifier, speculators, controller, sequences, num_rows, max_lengths, recorder)
        runner.loop, self.costs, self._told = self, costs, head_inputs_at(recorded)
        self._recorded = recorded
        self.device.phase = lambda: recorder.running
        self.steps: list[dict[str, float]] = []

    def drawn_from(self, requests: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Hidden states that the tokens at `positions` of `requests` (int64 `[n]` each) were drawn from."""
        last = self._recorded.sequences.lengths[requests] - 1
        return self._recorded.head_inputs[torch.from_numpy(self._told[requests] + np.minimum(positions, last))].float()

    def step(self) -> None:
        with self.device.outside():
            before = self._host_s()
        super().step()
        with self.device.outside():
            self.steps.append({phase: seconds - before[phase] for phase, seconds in self._host_s().items()})

    def prefill(self, leaders: np.ndarray, first_row: int) -> tuple[torch.Tensor, Hidden]:
        with self.device.outside():
            lengths = self.sequences.prompt_lengths[leaders]
            hidden = Hidden(np.cumsum(lengths) - lengths, self.drawn_from(leaders, lengths), {})
            seconds = self.costs.forward_s(len(leaders), int(lengths.sum()), 0)
        self.device.submit(seconds)
        return torch.empty(len(leaders), 0), hidden

    def _host_s(self) -> dict[str, float]:
        phases = ("controller", "draft", "forward", "sample", "commit", "observe")
        return {phase: self.recorder.seconds(phase) - self.device.waited_s[phase] for phase in phases}
