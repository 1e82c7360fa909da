"""Sizes and configuration of CUDA graphs that fit our steps, for building a vLLM engine.

    python -m atlas_rl.vllm.graphs 256       # for `vllm serve --compilation-config`, with --max-num-seqs 256

vLLM replays a full graph if one was captured for the step's number of tokens. By default it captures full graphs only
for steps in which every request has exactly `1 + num_speculative_tokens` tokens. In our steps a request has one token
plus as many drafts as pay, so all of them would run piecewise. `FULL` captures graphs for any mix of lengths, if the
attention backend supports it (FlashAttention 3, Triton). If it does not (FlashInfer, FlashAttention 2), vLLM itself
falls back to uniform steps, and `uniform_drafts` makes small steps uniform.

vLLM rounds a captured size up to a multiple of `1 + num_speculative_tokens`, and pads a step to the next captured size.
So `1 + num_speculative_tokens` is 16, vLLM's own granularity, and sizes above 256 tokens are an eighth apart: some
forty graphs for steps of up to 4,096 tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from atlas_rl.vllm.checks import NUM_SPECULATIVE_TOKENS

MOST_TOKENS = 4096
"""Larger steps keep a device busy for longer than the host takes to launch them."""
FILLED_TOKENS = 256
"""Steps of up to so many tokens read weights for longer than they compute (on a B200 up to some 280, by arithmetic)."""

_ITS_OWN = ("compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size")


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Token counts of the steps to capture, ascending, up to a step of all requests with full-length drafts."""
    unit = 1 + NUM_SPECULATIVE_TOKENS
    limit = min(max_num_seqs * unit, max(MOST_TOKENS // unit * unit, unit))
    sizes, size = [unit], unit
    while size < limit:
        size = min(size + max(unit, size // 8 // unit * unit), limit)
        sizes.append(size)
    return sizes


def compilation_config(max_num_seqs: int | None = None) -> dict[str, Any]:
    """vLLM's `compilation_config` for full graphs of our steps.

    Args:
        max_num_seqs: Most requests that run together; None if vLLM decides.
    """
    return {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": capture_sizes(max_num_seqs or MOST_TOKENS)}


def with_graphs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, with these graphs on CUDA unless the caller has configured graphs."""
    if not torch.cuda.is_available() or any(arguments.get(name) is not None for name in _ITS_OWN):
        return dict(arguments)
    return {**arguments, "compilation_config": compilation_config(arguments.get("max_num_seqs"))}


def uniform_drafts(
    drafts: list[list[int]], last_tokens: np.ndarray, room: np.ndarray, num_draft_tokens: int
) -> list[list[int]]:
    """Drafts padded to equal length, for backends whose full graphs need that; unchanged if the step got too large.

    Padding repeats a token. It is verified like any draft token, so only the size of the step changes.

    Args:
        drafts: Draft of each row, at most `num_draft_tokens` tokens.
        last_tokens: int `[rows]`, last committed token of each row.
        room: int `[rows]`, most draft tokens of each row.
        num_draft_tokens: Length of the padded drafts; 0 if any length will do.
    """
    size = len(drafts) * (1 + num_draft_tokens)
    if not num_draft_tokens or size > FILLED_TOKENS or room.min(initial=num_draft_tokens) < num_draft_tokens:
        return drafts
    ends = [draft[-1] if draft else last for draft, last in zip(drafts, last_tokens.tolist(), strict=True)]
    return [(draft + [end] * num_draft_tokens)[:num_draft_tokens] for draft, end in zip(drafts, ends, strict=True)]


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        sys.exit("usage: python -m atlas_rl.vllm.graphs MAX_NUM_SEQS, the server's --max-num-seqs")
    print(json.dumps(compilation_config(int(sys.argv[1]))))
