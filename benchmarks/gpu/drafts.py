"""Times drafts of the recurrent head, kernel by kernel and as CUDA graphs, until their tokens are on the host."""

from __future__ import annotations

from typing import Any

import torch

from atlas_kernels.noise import Stream
from atlas_kernels.truncation import Truncation
from atlas_rl.speculators.head_sampling import HeadSampling
from atlas_rl.speculators.recurrent.draft_graphs import DraftGraphs
from atlas_rl.speculators.recurrent.head import FoldedHead
from benchmarks.gpu.timing import host_ms
from tests.recurrent import draft_inputs, random_head

HEADS = ((256, 2048), (1024, 8192))
"""State size and tokens: one launch for all tokens of a draft, and some for each."""

HIDDEN, LENGTH = 1024, 4
_SAMPLINGS = {
    "plain": HeadSampling(0.9, None, Stream.TARGET, with_probs=False),
    "truncated": HeadSampling(0.9, Truncation(top_k=50, top_p=0.95), Stream.TARGET, with_probs=False),
}


def rows(batches: tuple[int, ...] = (1, 8, 32, 128)) -> list[dict[str, Any]]:
    return [row(head, batch, name) for head in HEADS for batch in batches for name in _SAMPLINGS]


def row(sizes: tuple[int, int], batch: int, sampling: str) -> dict[str, Any]:
    """Milliseconds of a draft of `LENGTH` tokens for `batch` requests."""
    state, tokens = sizes
    head = FoldedHead(random_head(0, tokens, hidden=HIDDEN, state=state).to("cuda"))
    weights = head.packed(torch.arange(tokens, device="cuda"), torch.bfloat16)
    states = torch.randn(batch, HIDDEN, device="cuda")
    inputs = draft_inputs(batch, 0, requests=batch, tokens=tokens)
    found: dict[str, Any] = {"state": state, "tokens": tokens, "batch": batch, "sampling": sampling}
    for name, capture in (("eager", False), ("captured", True)):
        graphs = DraftGraphs(capture=capture)
        arguments = head, weights, states, inputs, LENGTH, _SAMPLINGS[sampling]
        found[f"{name}_ms"] = host_ms(lambda graphs=graphs, arguments=arguments: graphs.run(*arguments))
    return found | {"capture_s": graphs.capture_s, "graph_bytes": graphs.num_bytes, "refused": graphs.refused}
