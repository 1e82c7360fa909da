"""Tables of linear layers' routes in which the winner is known."""

from __future__ import annotations

from typing import Any

import torch

from atlas_rl.policy.linear_routes import TURNED, Contest, RouteTable


def table_where(route: str | None, pack_s: float | None = 0.0) -> RouteTable:
    """A table of nobody's machine, in which one route wins all contests; None leaves them open."""

    class Settled(RouteTable):
        def contest(self, weight: torch.Tensor, has_bias: bool, rows: int, *_: Any, **others: Any) -> Contest:
            contest = Contest.between(rows, weight.dtype)
            if route is not None:
                best = route if route in contest.seconds else TURNED  # doubled is for one row
                contest.seconds = {name: [1.0 if name == best else 2.0] for name in contest.seconds}
                contest.pack_s = pack_s
                contest.decide()
            return contest

    return Settled(None, "nobody's")
