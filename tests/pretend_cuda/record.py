"""What happened, and where: the events of a pretended device."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAITS = ("sync", "d2h", "h2d", "build")
"""Kinds of events that make the host wait."""

_OURS = str(Path(__file__).resolve().parent) + "/"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that would happen on a GPU.

    Attributes:
        kind: See the package's docstring.
        what: The operation.
        where: `file:line function` of the innermost frame below one of the roots.
        section: Of `Record.section`, the innermost.
        count: Kernels, of launches; 1 otherwise.
        num_bytes: Copied.
        library: `file:line` of the frame that called torch, where that is not `where` itself.
        current: Index of the device that was current.
    """

    kind: str
    what: str
    where: str
    section: str
    count: int = 1
    num_bytes: int = 0
    library: str = ""
    current: int = 0


class Record:
    """Events, charged to the code that caused them.

    Args:
        roots: Folders whose frames events are charged to.
        forbid: Kinds of events that raise where they happen (see also `forbidding`).
        current: Index of the device that is current at first. All tensors are on device 0.
    """

    def __init__(self, roots: Sequence[str | Path], forbid: Sequence[str], current: int = 0) -> None:
        self.current = current
        self.roots = tuple(str(root).rstrip("/") + "/" for root in roots)
        self.events: list[Event] = []
        self.captured: list[Event] | None = None  # of the graph that is being captured; None where there is none
        self.is_invalidated = False  # the latest capture, by what must not be captured
        self.entered: Counter[str] = Counter()  # how often each section was
        self._sections = [""]
        self._forbidden = tuple(forbid)
        self._built: set[Any] = set()
        self._names: dict[str, tuple[bool, bool, str]] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Events inside are of this section."""
        self._sections.append(name)
        self.entered[name] += 1
        try:
            yield
        finally:
            self._sections.pop()

    def sectioned(self, function: Callable[..., Any], name: str | Callable[..., str]) -> Callable[..., Any]:
        """`function`, every call of it a section."""

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self.section(name(*args, **kwargs) if callable(name) else name):
                return function(*args, **kwargs)

        return called

    @contextmanager
    def forbidding(self, *kinds: str) -> Iterator[None]:
        """Inside, events of these kinds raise `AssertionError` where they happen."""
        before, self._forbidden = self._forbidden, (*self._forbidden, *kinds)
        try:
            yield
        finally:
            self._forbidden = before

    def count(self, *kinds: str, section: str | Collection[str] | None = None) -> int:
        """Events of these kinds (kernels, of launches), in one section, in some or in all."""
        return sum(e.count for e in self.of(*kinds, section=section))

    def of(self, *kinds: str, section: str | Collection[str] | None = None) -> list[Event]:
        """Events of these kinds, in one section, in some or in all."""
        wanted = (section,) if isinstance(section, str) else section
        return [e for e in self.events if e.kind in kinds and (wanted is None or e.section in wanted)]

    def astray(self) -> list[Event]:
        """Launches that take no notice of where their tensors are, made while another device was current."""
        return [e for e in self.events if e.current != 0 and (e.kind == "triton" or e.what == "graph")]

    def places(self, *kinds: str, section: str | Collection[str] | None = None) -> Counter[tuple[str, str, str]]:
        """How often, by kind, operation and place."""
        found: Counter[tuple[str, str, str]] = Counter()
        for event in self.of(*kinds, section=section):
            found[event.kind, event.what, event.where] += event.count
        return found

    def table(self, *kinds: str, section: str | Collection[str] | None = None, per: int = 1) -> str:
        """Places by count, the most frequent first; counts are divided by `per`, a number of steps."""
        rows = self.places(*(kinds or WAITS), section=section).most_common()
        return "\n".join(f"{n / per:8.2f}  {kind:9} {what:34} {where}" for (kind, what, where), n in rows)

    def event(self, kind: str, what: str, *, count: int = 1, num_bytes: int = 0) -> None:
        """Something happened, by the code that is running."""
        where, library = self._where()
        event = Event(kind, what, where, self._sections[-1], count, num_bytes, library, self.current)
        if self.captured is not None and kind != "build":
            if kind in WAITS:
                self.is_invalidated = True
                raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
            self.captured.append(event)  # nothing is launched
            return
        self.events.append(event)
        if kind in self._forbidden:
            raise AssertionError(f"{kind} on the device: {what} at {where}")

    def build(self, what: str, key: Any) -> None:
        """What is compiled once for each of these."""
        if key not in self._built:
            self._built.add(key)
            self.event("build", what)

    def _where(self) -> tuple[str, str]:
        frame: Any = sys._getframe(1)
        library = ""
        while frame is not None:
            name = frame.f_code.co_filename
            if name not in self._names:
                self._names[name] = self._kind(name)
            inside, calls_torch, short = self._names[name]
            if inside or (calls_torch and not library):
                place = f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
                if inside:
                    return place, library
                library = place
            frame = frame.f_back
        return library or "?", library

    def _kind(self, name: str) -> tuple[bool, bool, str]:
        """Of a file: whether events are charged to it, whether it may be a library that calls torch, and its short name."""
        if name.startswith((_OURS, "<")):
            return False, False, ""
        inside = name.startswith(self.roots) and "site-packages" not in name
        return inside, "/torch/" not in name and "unittest" not in name, self._short(name)

    def _short(self, name: str) -> str:
        for root in sorted(self.roots, key=len, reverse=True):
            if name.startswith(root):
                return name.removeprefix(root)
        return name.split("site-packages/")[-1]
