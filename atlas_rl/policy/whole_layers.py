"""Runs decoder layers of known code by one compiled function each, where that is faster.

`flat_layers.py` calls a kernel for each operation of a layer. With a few rows, as much time passes between the kernels as in
all but the products. `atlas_kernels/decoder_layer_cpu.py` runs all kernels in a row. For products it has our own kernel
(`few_rows_cpu.py`), where the parts have whichever route is fastest. So both are timed once the routes of the products are
known: some layers of a forward run one way, some the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from atlas_kernels.decoder_layer_cpu import LayerCall, Norm, Projection, Shape, decoder_layer, fits
from atlas_rl.policy import ragged_attention
from atlas_rl.policy.cpu_linear import FastLinears
from atlas_rl.policy.linear_routes import timing

PARTS, WHOLE = "parts", "whole"
"""Routes of a layer: operation by operation, each by its fastest route; and in one kernel."""


class WorkingMemory:
    """Memory for what a layer computes on its way; one for all layers, because they run one after the other."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0, dtype=torch.float32, device="cpu")

    def of(self, count: int) -> torch.Tensor:
        """At least so many float32 numbers, of any content."""
        if len(self._numbers) < count:
            self._numbers = torch.empty(count, dtype=torch.float32, device="cpu")
        return self._numbers


class WholeLayer:
    """A decoder layer whose projections are all plain, with a SiLU gate.

    Args:
        attention: Its attention layer.
        mlp: Its gated MLP.
        norms: Of the input and of the first residual sum, and those of queries and keys if there are any: each a module with
            a weight, an epsilon, and whether one is added to the weight.
        window: Most cells that a query sees; None is all.
        linears: Multiplies its linear layers; they are installed already.
        memory: See `WorkingMemory`.
    """

    def __init__(
        self,
        attention: Any,
        mlp: Any,
        norms: Sequence[tuple[Any, float, bool]],
        window: int | None,
        linears: FastLinears,
        memory: WorkingMemory,
    ) -> None:
        to_heads, gate_and_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
        self._attention, self._norms, self._window = attention, norms, window
        self._linears, self._memory = linears, memory
        self._layers = (*to_heads, attention.o_proj, *gate_and_up, mlp.down_proj)
        groups = (to_heads, (attention.o_proj,), gate_and_up, (mlp.down_proj,))
        self._forms = [linears.streamed(group) for group in groups]
        dim = attention.head_dim
        self._shape = Shape(
            hidden=attention.q_proj.in_features,
            heads=attention.q_proj.out_features // dim,
            kv_heads=attention.k_proj.out_features // dim,
            dim=dim,
            inner=mlp.gate_proj.out_features,
        )
        self._of_head = self._shape.kv_heads, dim
        self._work_columns = sum(self._shape.work_columns)

    def run(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, by_parts: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """`[num_tokens, hidden]` in and out, with angles `[1, num_tokens, dim]`, all contiguous float32 on a CPU.

        `by_parts` runs the layer operation by operation: for prompts, for other weights than the kernel takes, while the
        products' routes are timed, and if it is faster.
        """
        contest = self._linears.contest(self._shape, len(x), (PARTS, WHOLE))
        call = None if contest.winner == PARTS else self._call(len(x))
        if call is None:
            return by_parts()
        route = contest.winner or contest.next(may_pack=False)
        with timing(contest, route, len(x)) if contest.winner is None else nullcontext():
            return by_parts() if route == PARTS else decoder_layer(x, (cos, sin), call)

    def _call(self, num_tokens: int) -> LayerCall | None:
        """The kernel's arguments; None if it does not apply."""
        cache = ragged_attention.short_cache(self._attention)
        forms = [form for group in self._forms if (form := group(num_tokens)) is not None]
        if cache is None or len(forms) < len(self._forms) or cache.keys.shape[2:] != self._of_head:
            return None
        projections = [Projection(layer.weight, layer.bias) for layer in self._layers]
        norms = [Norm(module.weight, eps, adds_one) for module, eps, adds_one in self._norms]
        if not fits(self._shape, projections, norms):
            return None
        work = self._memory.of(num_tokens * self._work_columns)
        return LayerCall(self._shape, projections, norms, cache, self._attention.scaling, self._window, forms, work)
