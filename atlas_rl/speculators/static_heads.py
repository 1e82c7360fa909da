"""Static heads by folder, for engines that learn from the folder which head it holds."""

from __future__ import annotations

from pathlib import Path

from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.dflash.checkpoint import dflash_layers
from atlas_rl.speculators.dflash.speculator import DFlashSpeculator
from atlas_rl.speculators.eagle3.checkpoint import eagle3_layers
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.identify import DFLASH, DSPARK, EAGLE3, kind_of


def check_head(folder: str | Path) -> None:
    """Raise `ValueError` for a folder that holds no EAGLE-3, DFlash or DSpark head, or a damaged checkpoint."""
    kind = kind_of(folder)
    if kind not in (EAGLE3, DFLASH, DSPARK):
        raise ValueError(f"'{folder}' holds {kind}, no EAGLE-3 or DFlash head: give the folder of one")


def head_layers(folder: str | Path, num_layers: int) -> tuple[int, ...]:
    """Policy layers, of `num_layers`, that the EAGLE-3, DFlash or DSpark head in a folder reads.

    Raises:
        ValueError: The folder holds no such head, or a damaged one.
    """
    return (dflash_layers if kind_of(folder) in (DFLASH, DSPARK) else eagle3_layers)(folder, num_layers)


def head_speculator(folder: str | Path) -> Speculator:
    """A speculator with the head in a folder, read when it is bound; `ValueError` as above."""
    return DFlashSpeculator(folder) if kind_of(folder) in (DFLASH, DSPARK) else Eagle3Speculator(folder)
