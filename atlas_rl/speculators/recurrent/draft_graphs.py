"""Drafts with the recurrent head at fixed shapes: on a GPU a draft is captured once and then replayed by one launch.

A draft reads the policy's states, computes initial states, draws k tokens, and packs what the host fetches: some twelve
launches for a small head, and 2k more for a large one, or 5k more if the distribution is truncated. A CUDA graph
(`policy/captures.py`) launches all of them at once. So a draft takes one upload, one launch and one download.

**Shapes.** Rows and tokens of a draft are padded to one of a few sizes. Rows are padded by repeating the last one, and
all rows run to the longest wanted draft; neither changes the tokens of a row, which are computed alone. Larger drafts
hide their launches and are not padded.

**What a graph holds.** Addresses of the head's weights and of the states, and how tokens are drawn (`HeadSampling`).
Requests, noise keys, positions and newest tokens are its inputs. A refresh writes new weights where the old ones were, so
that graphs live on; when a tensor is replaced, because the vocabulary has grown or a call has more requests, all
graphs are dropped. They stay between calls, unlike those of the policy, but never reserve much memory.

Without CUDA the same draft is called directly (`capture=False`), so everything but the capture is tested on a CPU.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch

from atlas_kernels.head_call import DraftHeadWeights
from atlas_rl.policy.captures import Captures
from atlas_rl.policy.upload import begin_download, download, upload_into, uploaded
from atlas_rl.speculators.head_sampling import HeadSampling
from atlas_rl.speculators.recurrent.head import FoldedHead

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LENGTHS = (1, 2, 4, 6, 8, 12, 16)
"""Rows and draft tokens of captured drafts. Few, because a token in vain costs less than a further capture."""

_MOST_SHAPES = 64
_MOST_BYTES = 64 << 20  # of device memory, which a training step could use; one capture may exceed it
_SLACK = 4  # times the requests of a call: a larger table of states is given back

_DRAFTS_UNCAPTURED = (
    "atlas_rl: drafts of the recurrent head cannot be captured as CUDA graphs (%s): they are launched kernel by kernel, "
    "which takes longer for a small batch"
)
_DRAFTS_SHORT_OF_MEMORY = (
    "atlas_rl: no memory was left for the CUDA graph of a draft: the recurrent head launches its drafts kernel by kernel "
    "in this call, and tries again in the next one"
)


@dataclass(frozen=True, slots=True)
class FetchedDraft:
    """Tokens of a draft on the host.

    Attributes:
        token_ids: int64 `[batch, length]`, in the policy's vocabulary.
        max_probs: float32 `[batch, length]`, probability of the likeliest token.
        probs: float32 `[batch, length, tokens]` on the device, if wanted; the next draft overwrites it.
    """

    token_ids: np.ndarray
    max_probs: np.ndarray
    probs: torch.Tensor | None


@dataclass(slots=True)
class _Written:
    """Results on the device: int32 `[2, rows, length]`, token ids and the bits of their `max_probs`, and `probs`."""

    packed: torch.Tensor
    probs: torch.Tensor | None


@dataclass(slots=True)
class _Shape:
    """A draft of one shape.

    Attributes:
        inputs: int64 `[4, rows]` on the device: requests, noise keys, positions, newest tokens.
        length: Its draft tokens.
        has_run: Whether it has run, which has loaded its kernels.
        graph: The captured graph; None before the capture.
        written: Where the graph writes.
    """

    inputs: torch.Tensor
    length: int
    has_run: bool = False
    graph: torch.cuda.CUDAGraph | None = None
    written: _Written | None = None


class DraftGraphs(Captures):
    """Drafts of one head.

    Args:
        capture: Whether to capture drafts, or only to use their fixed shapes.
    """

    def __init__(self, *, capture: bool) -> None:
        super().__init__(capture=capture)
        self._shapes: dict[Hashable, _Shape] = {}
        self._addresses: tuple[Any, ...] = ()
        self._said: set[str] = set()
        if capture and torch.version.hip is not None:
            self.refused = "it has not been tried on AMD's GPUs"

    def begin_call(self) -> None:
        """Forget what concerns earlier calls only: a lack of memory, and graphs, if there is no room for new ones."""
        if self.short_of_memory:
            self.refused, self.short_of_memory = None, False
        if len(self._shapes) >= _MOST_SHAPES or self.num_bytes >= _MOST_BYTES:
            self._forget()

    def run(
        self,
        head: FoldedHead,
        weights: DraftHeadWeights,
        states: torch.Tensor,
        inputs: np.ndarray,
        length: int,
        sampling: HeadSampling,
    ) -> FetchedDraft:
        """`queue`, and wait for the draft: the host waits for the device once."""
        written = self._launched(head, weights, states, inputs, length, sampling)
        return _fetched(written, inputs.shape[1], length, partial(download, [written.packed]))

    def queue(
        self,
        head: FoldedHead,
        weights: DraftHeadWeights,
        states: torch.Tensor,
        inputs: torch.Tensor,
        length: int,
        sampling: HeadSampling,
    ) -> Callable[[], FetchedDraft]:
        """Draft for some requests; the returned function waits for the draft, and for nothing that is queued later.

        Args:
            head: Computes the initial states.
            weights: The same head, packed for its kernel.
            states: float32 `[num_requests, hidden]`, the policy's state that each newest token was drawn from.
            inputs: int64 `[4, batch]` on the device, per row: request, bits of the noise key, index of the first drafted
                token in the whole sequence, index of the newest token in the reduced vocabulary.
            length: Draft tokens of each row, at least 1.
            sampling: How they are drawn.
        """
        written = self._launched(head, weights, states, inputs, length, sampling)
        return partial(_fetched, written, inputs.shape[1], length, begin_download([written.packed]))

    def _launched(
        self,
        head: FoldedHead,
        weights: DraftHeadWeights,
        states: torch.Tensor,
        inputs: np.ndarray | torch.Tensor,
        length: int,
        sampling: HeadSampling,
    ) -> _Written:
        """Queue all device work of a draft; arguments as in `queue`, `inputs` also on the host."""
        self._follow([states, head.read, *(getattr(weights, each.name) for each in fields(weights))])
        batch, device = inputs.shape[1], states.device
        draft = partial(_drafted, head, weights, states, sampling)
        # Buffers must not be a caller's inference tensors, which later calls could not write into.
        with torch.inference_mode(False), torch.no_grad():
            shape = self._shape_for(batch, length, sampling, device)
            if shape is None:
                written = draft(inputs if isinstance(inputs, torch.Tensor) else uploaded(inputs, device), length)
            else:
                _fill(shape.inputs, inputs)
                written = self._advance(shape, partial(draft, shape.inputs, shape.length))
        self._say()
        return written

    def _follow(self, tensors: Sequence[torch.Tensor]) -> None:
        """Drop all graphs if one of these tensors is not where it was."""
        addresses = tuple((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors)
        if addresses != self._addresses:
            self._forget()
            self._addresses = addresses

    def _shape_for(self, batch: int, length: int, sampling: HeadSampling, device: torch.device) -> _Shape | None:
        """The least shape that fits; None if there is none, or if a fixed shape is of no use."""
        if batch > ROWS[-1] or length > LENGTHS[-1] or self.refused is not None:
            return None
        size = ROWS[bisect.bisect_left(ROWS, batch)], LENGTHS[bisect.bisect_left(LENGTHS, length)]
        key = *size, sampling
        if key not in self._shapes:
            if len(self._shapes) >= _MOST_SHAPES:
                return None
            inputs = torch.zeros(4, size[0], dtype=torch.int64, device=device)
            self._shapes[key] = _Shape(inputs, size[1])
        return self._shapes[key]

    def _advance(self, shape: _Shape, draft: Callable[[], _Written]) -> _Written:
        """Draft: plainly at first, which loads what a capture must not load, then captured, then replayed."""
        if shape.graph is not None:
            shape.graph.replay()
        elif shape.has_run and self.can_capture and self.num_bytes < _MOST_BYTES:
            self._record(shape, draft)
        shape.has_run = True
        return draft() if shape.graph is None or shape.written is None else shape.written

    def _record(self, shape: _Shape, draft: Callable[[], _Written]) -> None:
        """Capture the draft and run it, if that is possible."""

        def work() -> None:
            shape.written = draft()

        shape.graph = self._graph_of(work)
        if shape.graph is None:
            shape.written = None
            self._forget()  # nothing is replayed any more, and memory may be short

    def _forget(self) -> None:
        self._shapes.clear()
        self._free_pool()

    def _say(self) -> None:
        """Log once why drafts are not captured."""
        if self.refused is None or self.refused in self._said:
            return
        self._said.add(self.refused)
        if self.short_of_memory:
            logger.warning(_DRAFTS_SHORT_OF_MEMORY)
        else:
            logger.warning(_DRAFTS_UNCAPTURED, self.refused)


def cleared(states: torch.Tensor, num_requests: int) -> torch.Tensor:
    """Zeros for the states of some requests, in `states` itself (`[n, hidden]`) if that has a suitable size."""
    if num_requests <= len(states) <= _SLACK * num_requests:
        return states.zero_()
    with torch.inference_mode(False):
        return torch.zeros(num_requests, states.shape[1], dtype=states.dtype, device=states.device)


def _drafted(
    head: FoldedHead,
    weights: DraftHeadWeights,
    states: torch.Tensor,
    sampling: HeadSampling,
    inputs: torch.Tensor,
    length: int,
) -> _Written:
    """Queue all device work of a draft; arguments as in `DraftGraphs.run`, `inputs` on the device."""
    requests, keys, positions, newest = inputs.unbind()
    state = head.begin(states.index_select(0, requests))
    drawn = sampling.draw(weights, state, newest, keys, positions, length)
    token_ids = weights.token_ids[drawn.indices]
    return _Written(torch.stack([token_ids.int(), drawn.confidence.view(torch.int32)]), drawn.probs)


def _fetched(written: _Written, batch: int, length: int, arrived: Callable[[], list[np.ndarray]]) -> FetchedDraft:
    """The draft of the first rows and tokens, once `arrived` has given `written.packed` on the host."""
    (here,) = arrived()
    token_ids, bits = here[:, :batch, :length]
    probs = None if written.probs is None else written.probs[:batch, :length]
    return FetchedDraft(token_ids.astype(np.int64), bits.copy().view(np.float32), probs)


def _fill(target: torch.Tensor, inputs: np.ndarray | torch.Tensor) -> None:
    """Copy `inputs`, int64 `[4, batch]`, to where the draft reads them, padded with the last row."""
    batch = inputs.shape[1]
    if isinstance(inputs, torch.Tensor):
        target[:, :batch].copy_(inputs)
        target[:, batch:] = inputs[:, -1:]
        return
    padded = np.empty(target.shape, np.int64)
    padded[:, :batch], padded[:, batch:] = inputs, inputs[:, -1:]
    upload_into(target, padded)
