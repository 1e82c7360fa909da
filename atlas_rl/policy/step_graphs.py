"""Runs decode forwards of fixed shapes: on a GPU a step is captured once and then replayed by one launch.

A policy's modules launch some fifty kernels per layer. Launching them one by one from Python takes longer than running
them: 25 ms per forward of 28 layers, 4 ms of it GPU work (Qwen3 of 0.6 billion weights on an H100, batch 1). A CUDA
graph (`policy/captures.py`) launches all of them at once.

**Shapes.** A captured step has a fixed number of packed tokens, one of a few sizes. It is padded by repeating the last
token, which writes the same values again; logits of the padding are ignored. A new size costs two steps that are
launched kernel by kernel, ten times the price of a replay. So a somewhat larger existing size is used instead, until a
size has been needed often enough (`_PATIENCE`) to get its own graph, as in the ski rental problem.

For attention, every token is its own sequence: one query over the cells up to its own. So neither the number of rows
nor their lengths are part of the shape.

**Tails.** Work that follows every forward can join its step (`policy/step_tail.py`): verification, and packing its
results for the host. Its inputs lie behind the tokens, so that one copy brings both; its key is part of the shape. If a
step cannot be captured with its tail, forwards are captured alone.

**What a graph holds.** Addresses of the weights, of the cache, and of the replacements of linear layers. So a graph
belongs to one cache, which lives for one generation call, and weights stay in place meanwhile; if the cache's tensors
move, the graphs are dropped. Nothing captured can be stale in the next call. A draft LM enters a session for every draft
of a call, and its graphs serve all of them, under autocast as well. If a session finds the modules changed
(`policy/parts.py`), or under autocast a weight (`policy/autocast.py`), steps are captured anew.

Without CUDA the same step is called directly (`capture=False`), so everything but the capture is tested on a CPU.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import torch

from atlas_rl.policy.base import Segments, Taps
from atlas_rl.policy.captures import Captures
from atlas_rl.policy.placement import Placement
from atlas_rl.policy.ragged_attention import RaggedBatch
from atlas_rl.policy.step_inputs import padded_tokens
from atlas_rl.policy.step_tail import StepTail
from atlas_rl.policy.upload import upload_into
from atlas_rl.policy.varlen import Packing

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Packed tokens of a step: from 16 on, at most half more than needed. Beyond the last, a forward hides its launches."""

_VARIANTS = 2
_FEW = 16  # tokens: up to here a forward is bound by reading weights, and costs about the same
_PATIENCE = 64  # steps at a larger size; they waste about what a capture costs, if each wastes a fifth of its time

_NOTHING = np.zeros(0, np.int64)

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Taps], torch.Tensor]
"""Maps token ids, positions and wanted logits, int64 `[num_tokens]`, of placed tokens to logits, and fills the taps."""


@dataclass(slots=True)
class _Step:
    """A step of one shape.

    Attributes:
        size: Its tokens, padding included.
        inputs: int64 `[3 * size + n]` on the device: token ids, positions, cache rows, and the n inputs of its tail.
        tail: The tail of a step that is running; None otherwise, and for shapes without one.
        graph: The captured graph; None before the capture.
        logits, taps, result: Outputs of the graph; `result` is the tail's.
        runs: How often it has run.
    """

    size: int
    inputs: torch.Tensor
    taps: Taps
    tail: StepTail | None = None
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32, device="cpu"))
    result: torch.Tensor | None = None
    runs: int = 0

    @property
    def tokens(self) -> torch.Tensor:
        """int64 `[3, size]`: token ids, positions, cache rows."""
        return self.inputs[: 3 * self.size].view(3, self.size)


class StepGraphs(Captures):
    """The steps of one cache.

    Args:
        forward: Runs the policy over tokens that are placed in the cache.
        capture: Whether to capture steps, or only to use their fixed shapes.

    Attributes:
        tails_refused: Why steps cannot be captured with their tails; None as long as they can.
    """

    def __init__(self, forward: Callable[[RaggedBatch], Forward], *, capture: bool) -> None:
        super().__init__(capture=capture)
        self._forward = forward
        self._steps: dict[Hashable, _Step] = {}
        self._variants: set[Hashable] = set()
        self._rented: Counter[Hashable] = Counter()  # steps of a size that were run at a larger one
        self._generation = -1
        self.tails_refused: str | None = None

    def serves(self, segments: Segments, keep: np.ndarray) -> bool:
        """Whether this forward is such a step: rows continue, all logits are wanted, and there is a size for it."""
        num_tokens = len(segments.token_ids)
        return (
            self.refused is None
            and num_tokens <= SIZES[-1]
            and len(keep) == num_tokens
            and int(segments.starts.min()) > 0
        )

    def run(
        self,
        cache: RaggedBatch,
        segments: Segments,
        taps: Taps,
        variant: Hashable = None,
        tail: StepTail | None = None,
    ) -> torch.Tensor:
        """The logits of every packed token, float32 `[num_tokens, vocab]`.

        The next step overwrites them and the tail's result, but not the states in `taps`.

        Args:
            cache: Always the same one; its keys and values are allocated, in their final type.
            segments: Tokens for which `serves` is true.
            taps: Filled.
            variant: Key of the policy's modules and their present replacements; each variant has its own graphs.
            tail: Work that joins the step. Its `result` stays None if it cannot.
        """
        tail = tail if self.tails_refused is None else None
        rows = np.arange(len(segments.lengths)) + segments.first_row if segments.rows is None else segments.rows
        cache.grow(int(rows.max()) + 1, int((segments.starts + segments.lengths).max()))
        if self._generation != cache.generation:
            self.forget()
            self._generation = cache.generation
        num_tokens = len(segments.token_ids)
        rest = taps.wants_head_inputs, taps.wants_layers, variant, None if tail is None else tail.key
        size = self._size_for(num_tokens, rest)
        key = size, *rest
        behind = _NOTHING if tail is None else tail.inputs(size)
        step = self._steps.get(key)
        if step is None:
            # Two variants: the policy, and a copy of it that drafts. When another one appears, all graphs are dropped.
            if variant not in self._variants and len(self._variants) == _VARIANTS:
                self.forget()
            self._variants.add(variant)
            device = next(iter(cache.keys.values())).device
            inputs = torch.zeros(3 * size + len(behind), dtype=torch.int64, device=device)
            step = self._steps[key] = _Step(size, inputs, Taps(taps.wants_head_inputs, taps.wants_layers))
        step.tail = tail
        _fill(step, segments, rows, behind)
        self._advance(step, cache)
        step.tail = None  # it may hold large tensors
        if tail is not None:
            tail.result = step.result
        taps.head_inputs = step.taps.head_inputs[:num_tokens].clone()
        taps.layers = {layer: states[:num_tokens].clone() for layer, states in step.taps.layers.items()}
        return step.logits[:num_tokens]

    def _size_for(self, num_tokens: int, rest: tuple[Hashable, ...]) -> int:
        """The size at which to run `num_tokens` tokens: the smallest that fits, or a larger one that has been run."""
        own = SIZES[bisect.bisect_left(SIZES, num_tokens)]
        near = [size for size in SIZES if own < size <= max(2 * own, _FEW) and (size, *rest) in self._steps]
        if (own, *rest) in self._steps or not near or self._rented[own, *rest] == _PATIENCE:
            return own
        self._rented[own, *rest] += 1
        return near[0]

    def forget(self) -> None:
        """Drop all steps, and with them the replacements of modules that they ran with."""
        self._steps.clear()
        self._variants.clear()
        self._rented.clear()
        self._free_pool()

    def _advance(self, step: _Step, cache: RaggedBatch) -> None:
        """Run the step: plainly at first, which loads what a capture must not load, then captured, then replayed."""
        if step.graph is not None:
            step.graph.replay()
        elif step.runs == 0 or not self.can_capture:
            self._call(step, cache)
        else:
            self._record(step, cache)
        step.runs += 1

    def _call(self, step: _Step, cache: RaggedBatch) -> None:
        """Run the forward and the tail; fills the outputs of the step."""
        tokens, positions, rows = step.tokens
        cells = cache.held_cells
        packing = Packing(
            query_starts=torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device),
            key_starts=torch.nn.functional.pad((rows * cells).int(), (0, 1)),
            key_lengths=(positions + 1).int(),
            max_queries=1,
            max_keys=cells,
        )
        cache.placement = Placement(rows, positions, packing)
        keep = torch.arange(len(tokens), device=tokens.device)
        step.logits = self._forward(cache)(tokens, positions, keep, step.taps)
        if step.tail is not None:
            step.result = step.tail.run(step.logits, step.inputs[3 * step.size :])

    def _record(self, step: _Step, cache: RaggedBatch) -> None:
        """Capture the step and run it; if that is impossible, run it plainly."""
        step.graph = self._graph_of(lambda: self._call(step, cache))
        if step.graph is not None:
            return
        if step.tail is not None and not self.short_of_memory:  # perhaps it is the tail's fault
            self.tails_refused, self.refused = self.refused, None
        self.forget()  # no such step is replayed any more, and memory may be short
        self._call(step, cache)


def _fill(step: _Step, segments: Segments, rows: np.ndarray, behind: np.ndarray) -> None:
    """Copy the tokens and the tail's inputs to where the step reads them, in one copy if the host knows the tokens."""
    tokens, size = segments.token_ids, step.size
    if isinstance(tokens, np.ndarray):
        upload_into(step.inputs, padded_tokens(size, tokens, segments.starts, segments.lengths, rows, behind))
        return
    # Drafted on the device, and never fetched.
    numbers = padded_tokens(size, np.zeros(len(tokens), np.int64), segments.starts, segments.lengths, rows, behind)
    upload_into(step.inputs[size:], numbers[size:])
    step.inputs[: len(tokens)].copy_(tokens)
    step.inputs[len(tokens) : size].copy_(tokens[-1:].expand(size - len(tokens)))
