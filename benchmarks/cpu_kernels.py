"""Measures single operations of a decode step on a CPU in float32: attention over ragged rows, and linear layers.

    python -m benchmarks.cpu_kernels                     # on torch's threads; two minutes on 2 cores
    OMP_NUM_THREADS=1 python -m benchmarks.cpu_kernels --output one_thread.json
    python -m benchmarks.table benchmarks/results/cpu_kernels.json

Shapes are those of SmolLM2-135M. Every pass goes through the weights and caches of 30 layers in turn, so that they come from
memory, as in a step; caches of a few rows, some megabytes, may stay in the processor's. Forms take turns within a pass. `ms`
is that of all 30 layers, with the placement of the tokens.

- `attention`: the rectangle of torch's attention, and the compiled kernel (`atlas_rl/policy/short_rows.py`), for plain
  steps, for drafts of equal length, and for ragged ones.
- `linear`: queries, keys and values of the same rows, and gate and up: torch's `linear` one by one, the weight as the left
  operand, the kernel for a few rows (`atlas_kernels/few_rows_cpu.py`), packed one by one, and packed together
  (`atlas_rl/policy/cpu_linear.py`). `read_ms` is reading the weights once, by adding them up: the floor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn import functional

from atlas_kernels.few_rows_cpu import few_rows_linear
from atlas_rl import progress
from atlas_rl.policy import short_rows
from atlas_rl.policy.base import Segments
from atlas_rl.policy.linear_routes import packed, packed_weight, turned
from atlas_rl.policy.ragged_attention import RaggedBatch, active, attend_tokens
from benchmarks.common import ROOT, environment, quantiles, write_result

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM = 30, 576, 9, 3, 64
GROUPS = {"query, key, value": (576, 192, 192), "gate, up": (1536, 1536)}
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
FORMS = {"rectangle": 0, "compiled": short_rows.MOST_TOKENS}

Arms = dict[str, Callable[[], torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, default=150, help="cells of a row, in the mean")
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_kernels.json")
    args = parser.parse_args()
    operations = []
    with torch.inference_mode():
        for batch in progress.each(args.batches, "batch sizes of attention", "cell"):
            for lengths, starts in tokens_of(batch, args.context):
                about = {
                    "operation": "attention",
                    "batch": batch,
                    "tokens": lengths.tolist(),
                    "starts": starts.tolist(),
                }
                operations.append(about | timed(attention(lengths, starts), args.passes))
        for name, widths in GROUPS.items():
            for rows in progress.each(ROWS, f"rows through {name}", "cell"):
                about = {"operation": "linear", "layers": name, "batch": rows}
                arms, read = linear(rows, widths)
                reading = timed({"read": read}, args.passes)["ms"]["read"]
                operations.append(about | timed(arms, args.passes) | {"read_ms": reading})
    write_result(args.output, {**environment(), "context": args.context, "operations": operations})
    print(f"written: {args.output}")


def tokens_of(batch: int, context: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """New tokens of each row and where they begin: plain steps, drafts alike, longest ones, ragged drafts."""
    rng = np.random.default_rng(batch)
    alike = np.full(batch, context)
    ragged = rng.integers(1, 8, batch), rng.integers(context // 2, context * 3 // 2, batch)
    return [
        (np.full(batch, 1), alike),
        (np.full(batch, 4), alike),
        (np.full(batch, short_rows.MOST_TOKENS), alike),
        ragged,
    ]


def attention(lengths: np.ndarray, starts: np.ndarray) -> Arms:
    """A step of attention in both forms, over one cache."""
    tokens, held = int(lengths.sum()), int((starts + lengths).max())
    query, key, value = (torch.randn(tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache = RaggedBatch(len(lengths), held, honour_softcap=False, held_rows=len(lengths), held_cells=held)
    segments = Segments(np.zeros(tokens, np.int64), 0, starts, lengths)

    def step(most_tokens: int) -> torch.Tensor:
        with active(cache), mock.patch.object(short_rows, "MOST_TOKENS", most_tokens):
            cache.place(segments, torch.device("cpu"))
            for layer in range(LAYERS):
                out = attend_tokens(SimpleNamespace(layer_idx=layer), query, key, value, DIM**-0.5, None)
        return out

    return {name: lambda most=most: step(most) for name, most in FORMS.items()}  # type: ignore[misc]


def linear(rows: int, widths: tuple[int, ...]) -> tuple[Arms, Callable[[], torch.Tensor]]:
    """Layers that multiply the same rows, in five forms, and what reads their weights."""
    x = torch.randn(rows, HIDDEN)
    weights = [[torch.randn(width, HIDDEN) / 24 for width in widths] for _ in range(LAYERS)]
    apart = [[packed_weight(weight) for weight in layer] for layer in weights]
    joined = [packed_weight(torch.cat(layer)) for layer in weights]

    def through(layers: list[Any], multiply: Callable[[torch.Tensor, Any], torch.Tensor]) -> torch.Tensor:
        products = [[multiply(x, weight) for weight in layer] for layer in layers]
        return torch.cat(products[-1], dim=1)

    def by_packed(rows: torch.Tensor, weight: Any) -> torch.Tensor:
        return packed(rows, weight, None)

    def by_turned(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return turned(rows, weight, None)

    def streamed() -> torch.Tensor:
        products = [few_rows_linear(x, layer) for layer in weights]
        return torch.cat(products[-1], dim=1)

    def read() -> torch.Tensor:
        return torch.stack([weight.sum() for layer in weights for weight in layer])

    arms = {
        "linear": lambda: through(weights, functional.linear),
        "turned": lambda: through(weights, by_turned),
        "streamed": streamed,
        "packed": lambda: through(apart, by_packed),
        "packed together": lambda: through([[layer] for layer in joined], by_packed),
    }
    return arms, read


def timed(arms: Arms, passes: int) -> dict[str, Any]:
    """Milliseconds of each form, in turns. All forms must give the same numbers, up to rounding."""
    results = {name: run() for name, run in arms.items()}  # compiles, too
    first = next(iter(results.values()))
    for name, result in results.items():
        torch.testing.assert_close(result, first, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(passes):
        for name, run in arms.items():
            began_s = time.perf_counter()
            run()
            taken[name].append(1e3 * (time.perf_counter() - began_s))
    return {"ms": {name: quantiles(each) | {"least": min(each)} for name, each in taken.items()}}


if __name__ == "__main__":
    main()
