"""The routes that compute a linear layer on a CPU, and the contest that finds the fastest for a shape.

A decode step multiplies a few rows by every weight, and is bound by reading the weights. How close a library comes to
that bound varies by an order of magnitude, and by processor: for one row of SmolLM2's layers `F.linear` took 7 ms on a
Xeon and 49 ms on an EPYC, where two rows took 18 ms with the operands swapped. So routes are timed. If several layers
have one shape, the first forwards run some by one route and some by another, so that each timing reads weights from
memory, as later forwards do. Results are kept on disk (`RouteTable`), by machine, number of threads, and versions of torch
and of our kernel.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from atlas_kernels.few_rows_cpu import FORMS, few_rows_linear, kernel_version

logger = logging.getLogger(__name__)

PLAIN, TURNED, DOUBLED, WIDENED, PACKED = "plain", "turned", "doubled", "widened", "packed"
"""`F.linear`; the weight as the tall operand; that with a row given twice; in float32; in oneDNN's layout.

A processor without units for bfloat16 multiplies one number at a time: 32 rows take six times as long as in float32,
128 take eight times. `WIDENED` converts such weights in every forward; a packed copy of them is in float32.
"""

_STREAMED = "streamed", "streamed wide"
STREAMED = dict(zip(_STREAMED, range(len(FORMS)), strict=False))
"""Routes by our kernel, with the form of its tiles; a processor without long vectors has one."""

_FILE = "linear_routes_4.json"  # a release that does not know a route cannot read the file
_ENOUGH = 4  # timings of a route: the first one warms caches and compiles
_WIDENED_BYTES = 1 << 25  # size of a weight's pieces in float32
_HOPELESS = 1.5  # a route that took this many times the best one twice is not tried again

MIN_BYTES = 1 << 18
"""Smaller weights stay in any processor's cache, where PyTorch's route is as good as any other."""

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Row counts that have a contest; other counts use the contest of the next larger one, or of the last."""
_BUCKET_OF = tuple(next(bucket for bucket in BUCKETS if rows <= bucket) for rows in range(1, BUCKETS[-1] + 1))

_STREAMED_ROWS = 128  # most that our kernel is timed for

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def turned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of `[rows, in]` with the weight as the tall operand: BLAS streams it instead of packing it."""
    # Contiguous again, because every elementwise operation downstream would walk the transposed layout.
    out = (weight @ x.t()).t().contiguous()
    return out if bias is None else out.add_(bias)


def doubled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`turned` with its single row given twice, for a BLAS whose matrix-vector product is slow."""
    # A real second row: an expanded one has no stride, and torch then copies it into the layout that BLAS does slowly.
    out = (weight @ torch.cat((x, x)).t())[:, :1].t().contiguous()
    return out if bias is None else out.add_(bias)


def streamed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, form: int) -> torch.Tensor:
    """`F.linear` of a few rows `[rows, in]` in float32, which reads the weight once (`atlas_kernels/few_rows_cpu.py`)."""
    (out,) = few_rows_linear(x, (weight,), form)
    return out if bias is None else out.add_(bias)


def widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of half precision, computed in float32 and rounded once, even if the processor has the type.

    The weight is converted piece by piece: an LM head in float32 would take gigabytes that were not accounted for.
    """
    x32 = x.float()
    pieces = weight.split(max(1, _WIDENED_BYTES // (4 * weight.shape[1])))
    out = torch.cat([functional.linear(x32, piece.float()) for piece in pieces], dim=-1)
    return (out if bias is None else out.add_(bias.float())).to(x.dtype)


ROUTES: dict[str, Product] = {
    PLAIN: functional.linear,
    TURNED: turned,
    DOUBLED: doubled,
    **{route: partial(streamed, form=form) for route, form in STREAMED.items()},
    WIDENED: widened,
}

_ALL = {*ROUTES, *_STREAMED, PACKED}


def bucket_of(rows: int) -> int:
    """The row count whose contest a forward over `rows` rows takes part in."""
    return _BUCKET_OF[min(rows, BUCKETS[-1]) - 1]


def packed_type(dtype: torch.dtype) -> torch.dtype | None:
    """The type of packed weight copies: float32 if oneDNN packs nothing else here; None if it packs nothing."""
    return next((kind for kind in (dtype, torch.float32) if _can_pack(kind)), None)


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack weights of a type here, as `torch.compile` does with frozen weights."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(16, 16, dtype=dtype, device="cpu"), 16)
        torch.ops.mkldnn._linear_pointwise(torch.ones(2, 16, dtype=dtype, device="cpu"), weight, None, "none", [], "")
    except RuntimeError:  # the processor does not support the type
        return False
    return True


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a weight of type `packed_type` in oneDNN's layout, for `packed`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(packed_type(weight.dtype)), 16)


def packed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of `[rows, in]` with a weight from `packed_weight`."""
    bias = None if bias is None else bias.to(weight.dtype)
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "").to(x.dtype)


@dataclass(slots=True)
class Contest:
    """Times the routes for one shape until the fastest is known.

    Attributes:
        seconds: Timings of each route, newest last.
        pack_s: Seconds that packing one layer takes, see `price`; None if it was not tried.
        winner: The fastest route once it is known.
        runner_up: The fastest one that needs no packed copy.
        is_whole: Whether all routes took part.
        compiled: Numbers of rows that packed products have been computed for in this process.
        tries: How often layers were packed for it in this process.
    """

    seconds: dict[str, list[float]]
    pack_s: float | None = None
    winner: str | None = None
    runner_up: str = PLAIN
    is_whole: bool = True
    compiled: set[int] = field(default_factory=set)
    tries: int = 0

    @classmethod
    def between(cls, rows: int, dtype: torch.dtype, may_pack: bool = True) -> Contest:
        """A new contest for a number of rows of a type."""
        takes_part = {
            DOUBLED: rows == 1,
            **dict.fromkeys(STREAMED, dtype == torch.float32 and rows <= _STREAMED_ROWS),
            WIDENED: dtype != torch.float32,
            PACKED: may_pack and packed_type(dtype) is not None,
        }
        names = [name for name in (*ROUTES, PACKED) if takes_part.get(name, True)]
        return cls({name: [] for name in names})

    def next(self, may_pack: bool) -> str:
        """The route to time next, among those that may still win; without a packed copy, one that needs none."""
        routes = [name for name in self._open() if name != PACKED or may_pack]
        return min(routes, key=lambda name: len(self.seconds[name]), default=self._fastest(but=PACKED))

    def note(self, route: str, seconds: float) -> None:
        """Record a timing of a route, if it is wanted."""
        if route in self._open():
            self.seconds[route].append(seconds)
            self._end_if_known()

    def leave_out_packed(self) -> None:
        """Exclude packed copies in this process, because memory for them is lacking now, or sessions are too short."""
        del self.seconds[PACKED]
        self.is_whole = False
        self._end_if_known()

    def price(self, seconds: float) -> None:
        """Record what packing took, per layer.

        The first layers that are ever packed may go to memory that the process has in use, which takes a tenth of the
        time; other load may make a packing take many times as long. So half of the way to the newest, as a ratio.
        """
        self.pack_s = seconds if not self.pack_s else math.sqrt(self.pack_s * seconds)

    def decide(self) -> None:
        """Choose the winner by the timings so far."""
        self.winner, self.runner_up = self._fastest(), self._fastest(but=PACKED)

    @property
    def gain_s(self) -> float:
        """Seconds per layer and forward that a packed copy saves."""
        return self.cost_s(self.runner_up) - self.cost_s(PACKED) if self.winner == PACKED else 0.0

    def cost_s(self, route: str) -> float:
        """Estimated seconds of a route: the least timing, because other load only adds to it."""
        return min(self.seconds[route], default=float("inf"))

    def least_s(self, rows: int, may_pack: bool) -> float:
        """Seconds of the fastest route so far for `rows` rows, packed or only without a copy; 0 before any timing."""
        routes = (timed for name, timed in self.seconds.items() if timed and (may_pack or name != PACKED))
        return min(map(min, routes), default=0.0) * max(1.0, rows / BUCKETS[-1])

    def _end_if_known(self) -> None:
        """One fast timing may rule out several other routes at once, and end the contest."""
        if not self._open():
            self.decide()

    def _open(self) -> list[str]:
        """Routes that need more timings and may still be the fastest."""
        best = min((min(timed) for timed in self.seconds.values() if timed), default=float("inf"))
        return [
            name
            for name, timed in self.seconds.items()
            if len(timed) < 2 or (len(timed) < _ENOUGH and min(timed) <= _HOPELESS * best)
        ]

    def _fastest(self, but: str | None = None) -> str:
        return min((name for name in self.seconds if name != but), key=self.cost_s)


def by_route(contest: Contest, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of `[rows, in]` by the best route without a weight copy, timed until that is known."""
    if contest.winner is not None:
        return ROUTES[contest.runner_up](x, weight, bias)
    with timing(contest, route := contest.next(may_pack=False), len(x)):
        return ROUTES[route](x, weight, bias)


@contextmanager
def timing(contest: Contest, route: str, rows: int) -> Iterator[None]:
    """Context in which a route runs for `rows` rows; the last bucket may have more rows than it is named after."""
    began_s = time.perf_counter()
    yield
    contest.note(route, (time.perf_counter() - began_s) * min(1.0, BUCKETS[-1] / rows))


@dataclass(slots=True)
class RouteTable:
    """Contests of a machine, and the file that stores them.

    Args:
        path: The file's path; None stores nothing.
        machine: Machine that the timings are valid for.
        contests: Contests by `outputs x inputs, type, bias, rows`.
    """

    path: Path | None
    machine: str
    contests: dict[str, Contest] = field(default_factory=dict)
    _num_saved: int = 0

    @classmethod
    def of_this_machine(cls) -> RouteTable:
        """The table of this machine, from this process and earlier ones; an unreadable file counts as empty."""
        path, machine = cache_folder() / _FILE, machine_name(torch.get_num_threads())
        if (path, machine) not in _TABLES:
            _TABLES[path, machine] = cls._loaded(path, machine)
        return _TABLES[path, machine]

    @classmethod
    def _loaded(cls, path: Path, machine: str) -> RouteTable:
        table = cls(path, machine)
        for name, known in table._read().get(table.machine, {}).items():
            contest = Contest({route: [s] for route, s in known["seconds"].items()}, known["pack_s"])
            contest.decide()
            table.contests[name] = contest
        table._num_saved = len(table.contests)
        return table

    def contest(
        self,
        weight: torch.Tensor,
        has_bias: bool,
        rows: int,
        may_pack: bool = True,
        others: Sequence[torch.Tensor] = (),
    ) -> Contest:
        """The contest for a weight's shape and type and a bucket of rows, with or without packed copies.

        `others` are weights that multiply the same rows; their packed copy is one with this weight's.
        """
        outputs, inputs = "+".join(str(len(each)) for each in (weight, *others)), weight.shape[1]
        name = f"{outputs}x{inputs} {str(weight.dtype).removeprefix('torch.')}{' bias' if has_bias else ''}, {rows}"
        if not may_pack:
            name += ", unpacked"
        new = Contest.between(rows, weight.dtype, may_pack)
        known = self.contests.setdefault(name, new)
        if known.is_whole and known.seconds.keys() != new.seconds.keys():  # by another release
            known = self.contests[name] = new
        return known

    def save(self) -> None:
        """Save decided contests. If the disk cannot be written to, the next run repeats a few timings."""
        decided = {name: contest for name, contest in self.contests.items() if contest.winner and contest.is_whole}
        if self.path is None or len(decided) == self._num_saved:
            return
        known = self._read()
        known[self.machine] = known.get(self.machine, {}) | {
            name: {"seconds": {route: contest.cost_s(route) for route in contest.seconds}, "pack_s": contest.pack_s}
            for name, contest in decided.items()
        }
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(known, indent=1), encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            logger.debug("atlas_rl: routes of linear layers are not kept: %s", error)
        self._num_saved = len(decided)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8")) if self.path is not None else {}
            return known if _is_table(known) else {}
        except (OSError, ValueError):
            return {}


_TABLES: dict[tuple[Path, str], RouteTable] = {}


def _is_table(known: object) -> bool:
    """Whether this is valid content of a file by `RouteTable.save`."""
    return isinstance(known, dict) and all(
        isinstance(contests, dict)
        and all(
            isinstance(contest, dict)
            and isinstance(contest.get("seconds"), dict)
            and set(contest["seconds"]) <= _ALL  # another machine may have more
            and {PLAIN} <= set(contest["seconds"])
            and all(isinstance(s, float) for s in contest["seconds"].values())
            and isinstance(contest.get("pack_s", ...), float | None)
            for contest in contests.values()
        )
        for contests in known.values()
    )


def cache_folder() -> Path:
    """Folder for measurements of this machine: `ATLAS_RL_CACHE`, or the user's cache folder."""
    own = os.environ.get("ATLAS_RL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atlas_rl"


@cache
def machine_name(num_threads: int) -> str:
    """Processor, threads, torch version and version of our kernel, for which timings are valid."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = ("model name", "cpu family", "model", "stepping", "cache size")
        said = {line.split("\t")[0]: line.partition(":")[2].strip() for line in lines if line}
        processor = " ".join(said[name] for name in fields if name in said) or processor
    except OSError:
        pass
    return f"{processor}, {num_threads} threads, torch {torch.__version__}, kernel {kernel_version()[:8]}"
