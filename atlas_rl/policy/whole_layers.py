"""Runs decoder layers of known code by one compiled function each, where that is faster.

`flat_layers.py` calls a kernel for each operation of a layer. With a few rows, as much time passes between the kernels as in
all but the products. `atlas_kernels/decoder_layer_cpu.py` runs all kernels in a row. For products it has our own kernel
(`few_rows_cpu.py`), where the parts have whichever route is fastest. So both are timed once the routes of the products are
known: some layers of a forward run one way, some the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import is_not
from typing import Any

import numpy as np
import torch

from atlas_kernels.attend_cpu import Cache
from atlas_kernels.decoder_layer_cpu import (
    Norm,
    Shape,
    Weights,
    decoder_layer,
    fits,
    plan_of,
    step_of,
    weights_of,
)
from atlas_rl.policy import ragged_attention
from atlas_rl.policy.cpu_linear import FastLinears
from atlas_rl.policy.linear_routes import Contest

PARTS, WHOLE = "parts", "whole"
"""Routes of a layer: operation by operation, each by its fastest route; and in one kernel."""


class WholeLayers:
    """What the layers of a session share: plans for numbers of tokens, the present step, and working memory.

    Layers run one after the other, so one memory serves all.

    Args:
        linears: Multiplies the linear layers; they are installed already.
    """

    def __init__(self, linears: FastLinears) -> None:
        self.linears = linears
        self._plans: dict[tuple[Shape, int, int], np.ndarray] = {}
        self._work = torch.empty(0, dtype=torch.float32, device="cpu")
        self._step: tuple[tuple[Any, ...], np.ndarray] | None = None

    def contest(self, shape: Shape, num_tokens: int) -> Contest:
        """The contest between the routes of layers of a shape."""
        return self.linears.contest(shape, num_tokens, (PARTS, WHOLE))

    def plan(self, shape: Shape, num_tokens: int, forms: Callable[[], list[int] | None]) -> np.ndarray | None:
        """See `decoder_layer_cpu.plan_of`; None if `forms` returns None. Layers of a shape have the forms of the first."""
        key = shape, num_tokens, torch.get_num_threads()
        plan = self._plans.get(key)
        if plan is not None or (found := forms()) is None:
            return plan
        count = num_tokens * shape.work_columns
        if len(self._work) < count:
            self._work = torch.empty(count, dtype=torch.float32, device="cpu")
            self._plans.clear()  # they have the old one's address
        plan = self._plans[key] = plan_of(shape, num_tokens, found, self._work)
        return plan

    def step(self, shape: Shape, cos: torch.Tensor, sin: torch.Tensor, cache: Cache) -> np.ndarray:
        """See `decoder_layer_cpu.step_of`."""
        parts = shape, cos, sin, *cache[2:]
        known = self._step
        if known is None or known[0][0] != shape or any(map(is_not, known[0][1:], parts[1:])):
            known = self._step = parts, step_of(shape, (cos, sin), cache)
        return known[1]


class WholeLayer:
    """A decoder layer whose projections are all plain and have routes, with a SiLU gate.

    Args:
        attention: Its attention layer.
        mlp: Its gated MLP.
        norms: Of the input and of the first residual sum, and those of queries and keys if there are any: each a module with
            a weight, an epsilon, and whether one is added to the weight.
        window: Most cells that a query sees; None is all.
        form_of: For each group of projections, from `FastLinears.streamed`.
        shared: See `WholeLayers`.
    """

    def __init__(
        self,
        attention: Any,
        mlp: Any,
        norms: Sequence[tuple[Any, float, bool]],
        window: int | None,
        form_of: Sequence[Callable[[int], int | None]],
        shared: WholeLayers,
    ) -> None:
        to_heads, gate_and_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
        self._attention, self._norms, self._window = attention, norms, window
        self._form_of, self._shared = form_of, shared
        # Parameters, not attributes: those take three times as long to read.
        self._linear = [each._parameters for each in (*to_heads, attention.o_proj, *gate_and_up, mlp.down_proj)]
        self._normed = [module._parameters for module, *_ in norms]
        dim = attention.head_dim
        self._shape = Shape(
            hidden=attention.q_proj.in_features,
            heads=attention.q_proj.out_features // dim,
            kv_heads=attention.k_proj.out_features // dim,
            dim=dim,
            inner=mlp.gate_proj.out_features,
        )
        self._of_head = self._shape.kv_heads, dim
        self._known: tuple[list[int], float, Weights] | None = None

    def run(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, by_parts: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """`[num_tokens, hidden]` in and out, with angles `[1, num_tokens, dim]`, all contiguous float32 on a CPU.

        `by_parts` runs the layer operation by operation: for prompts, for other weights than the kernel takes, while the
        products' routes are timed, and if it is faster.
        """
        contest = self._shared.contest(self._shape, x.shape[0])
        if contest.winner == PARTS:
            return by_parts()
        began_s = time.perf_counter()
        call = self._call(x, cos, sin)
        if call is None:
            return by_parts()
        if contest.winner is not None:
            return decoder_layer(x, *call)
        if (route := contest.next(may_pack=False)) == PARTS:
            began_s, out = time.perf_counter(), by_parts()
        else:
            out = decoder_layer(x, *call)
        self._shared.linears.note(contest, route, time.perf_counter() - began_s, x.shape[0])
        return out

    def _call(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Weights, np.ndarray, np.ndarray] | None:
        """The kernel's arguments; None if it does not apply."""
        num_tokens, hidden = x.shape
        cache = ragged_attention.short_cache(self._attention)
        if cache is None or len(cache.rows) != num_tokens or cache.keys.shape[2:] != self._of_head:
            return None
        plan = self._shared.plan(self._shape, num_tokens, partial(self._forms, num_tokens))
        if plan is None or hidden != self._shape.hidden or (weights := self._weights()) is None:
            return None
        return cache.keys, cache.values, weights, plan, self._shared.step(self._shape, cos, sin, cache)

    def _forms(self, num_tokens: int) -> list[int] | None:
        """Forms of the products; None while one of their routes is timed, or if the kernel takes no part."""
        forms = [form for form_of in self._form_of if (form := form_of(num_tokens)) is not None]
        return forms if len(forms) == len(self._form_of) else None

    def _weights(self) -> Weights | None:
        """The weights as they are now; None if the kernel does not take them."""
        weights: list[Any] = [each.get("weight") for each in self._linear]
        biases = [each.get("bias") for each in self._linear]
        normed: list[Any] = [each.get("weight") for each in self._normed]
        if not fits(self._shape, weights, biases, normed):
            self._known = None
            return None
        scale = self._attention.scaling
        places = [0 if each is None else each.data_ptr() for each in (*weights, *normed, *biases)]
        if self._known is None or self._known[0] != places or self._known[1] != scale:
            norms = [Norm(weight, eps, one) for weight, (_, eps, one) in zip(normed, self._norms, strict=True)]
            self._known = places, scale, weights_of(weights, biases, norms, scale, self._window)
        return self._known[2]
