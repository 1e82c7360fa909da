"""Multiplies rows with a group of linear layers by one route, and times routes (`linear_routes.py`)."""

from __future__ import annotations

import torch
from torch import nn

from atlas_kernels.few_rows_cpu import few_rows_linear
from atlas_rl.policy.linear_routes import PACKED, ROUTES, STREAMED, Contest, packed, timing
from atlas_rl.policy.weight_copy import WeightCopy

Group = tuple[nn.Linear, ...]
"""Layers that multiply the same rows: most often one. A packed copy of several is one matrix, and one product."""
Copies = tuple[WeightCopy, ...]
"""The packed copy of a group, once per layer, so that each layer's weight is checked."""


def timed(
    contest: Contest, x: torch.Tensor, group: Group, copy: Copies | None, is_only_one: bool
) -> tuple[torch.Tensor, ...]:
    """Multiply rows `[rows, in]` by the route that a contest is to time next; `is_only_one`: no other group is alike."""
    route = contest.next(may_pack=copy is not None)
    if route == PACKED and len(x) not in contest.compiled:
        # oneDNN compiles a product when it first sees a number of rows, which takes up to ten times as long as the product.
        contest.compiled.add(len(x))
        out = by_one_route(route, x, group, copy)
        if not is_only_one:  # another group is timed, whose weight is read from memory
            return out
    with timing(contest, route, len(x)):
        return by_one_route(route, x, group, copy)


def by_one_route(route: str, x: torch.Tensor, group: Group, copy: Copies | None) -> tuple[torch.Tensor, ...]:
    """Multiply rows `[rows, in]`, of the layers' own type; `copy` is needed by the packed route only."""
    if route in STREAMED and len(group) > 1:  # one pass over all weights
        outs = few_rows_linear(x, [layer.weight for layer in group], STREAMED[route])
        return tuple(
            [out if layer.bias is None else out.add_(layer.bias) for out, layer in zip(outs, group, strict=True)]
        )
    if route != PACKED:
        product = ROUTES[route]
        return tuple([product(x, layer.weight, layer.bias) for layer in group])
    assert copy is not None, "layers without a copy have another route"
    if len(group) == 1:
        return (packed(x, copy[0].made, group[0].bias),)
    bias = None if group[0].bias is None else torch.cat([layer.bias for layer in group])
    return packed(x, copy[0].made, bias).split([layer.weight.shape[0] for layer in group], dim=-1)
