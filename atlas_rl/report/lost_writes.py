"""Tolerates failed writes: a full disk costs a line or a file, never the tokens of a call or a training run."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


class LostWrites:
    """Counts failed writes; reports the first of each kind, and their number when writing works again.

    Attributes:
        counts: Losses so far by kind, such as `{"report line": 3}`.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._unsaid: Counter[str] = Counter()

    @contextmanager
    def tolerate(self, kind: str) -> Iterator[None]:
        """Context in which an `OSError` costs one item of this `kind` and nothing else."""
        try:
            yield
        except OSError as error:
            self.counts[kind] += 1
            self._unsaid[kind] += 1
            if self._unsaid[kind] == 1:
                logger.warning(
                    "atlas_rl: a %s was lost (%s). Generation goes on; further losses are only counted: "
                    "free space, or reconnect the disk",
                    kind,
                    error,
                )
        else:
            if lost := self._unsaid.pop(kind, 0):
                logger.warning("atlas_rl: writing a %s works again; %d were lost", kind, lost)


def check_folder(folder: Path, option: str, *files: str) -> None:
    """Make sure that a folder exists and can be written to.

    Args:
        folder: Value of `option`.
        option: Name for the error.
        files: Names of files in it that will be appended to.

    Raises:
        ValueError: The folder or a file cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # a full disk accepts an empty file
        for name in files:
            if (folder / name).exists():
                with (folder / name).open("ab"):
                    pass
    except OSError as error:
        raise ValueError(
            f"{option}='{folder}' cannot be written to ({error}): name a folder that can, or leave it out"
        ) from error
