"""Progress bars for long work, on stderr if it is a terminal; logs and continuous integration get lines only."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class _Bar(tqdm):
    monitor_interval = 0  # no thread of tqdm's beside what a benchmark times, and none to hold a lock across a fork


def shown() -> bool:
    """Whether bars are shown: stderr is a terminal and `CI` is not set."""
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return sys.stderr is not None and sys.stderr.isatty() and not in_ci


def bar(what: str, total: int, unit: str, *, done: int = 0, after_s: float = 0.0) -> Any:
    """A bar with `update()` and `close()`, also a context manager; it leaves nothing behind.

    Args:
        what: Is done, in a word or two.
        total: Units of the whole work.
        unit: Name of one of them.
        done: Units that were done before.
        after_s: Seconds of work without a bar: shorter work shows none.
    """
    return _Bar(
        total=total,
        desc=what,
        unit=unit,
        initial=done,
        delay=after_s,
        leave=False,
        dynamic_ncols=True,
        disable=not shown(),
    )


def each(items: Collection[Item], what: str, unit: str) -> Iterator[Item]:
    """Yield the items under a bar that advances when the next one is requested."""
    with bar(what, len(items), unit) as moving:
        for item in items:
            yield item
            moving.update()


def say(*parts: object) -> None:
    """Print a line on stdout at once, above any bars (a trainer's too); nothing if there is no stdout."""
    if sys.stdout is None:
        return
    tqdm.write(" ".join(map(str, parts)), file=sys.stdout)
    sys.stdout.flush()


@contextmanager
def loading() -> Iterator[None]:
    """Context in which bars of transformers for loading checkpoints are shown exactly if ours are."""
    from transformers.utils import logging

    silenced = logging.is_progress_bar_enabled() and not shown()
    if silenced:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silenced:
            logging.enable_progress_bar()
