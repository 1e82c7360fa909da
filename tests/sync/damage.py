"""Damages drafters' saved states in every way a disk, another version or a stranger's hand might; seeded.

    python -m tests.sync.damage SEED NUM_VARIANTS FILE

loads that many damaged variants of a saved state and drafts with whatever was accepted. A process of its own, because
compiled code that indexes by a damaged number ends the process that runs it.
"""

from __future__ import annotations

import copy
import faulthandler
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas_rl.sync.checkpoint import load_state, save_state
from tests.engines import engine_of, generate

NUMBERS = (
    -1,
    0,
    1,
    2**31 - 1,
    2**31,
    2**62,
    -(2**62),
    1.5,
    float("nan"),
    float("inf"),
    1e300,
    -1e300,
    None,
    "7",
    True,
    [1],
    {},
)
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "uint64", "float16", "float32", "float64", "bool")


def leaves(state: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of everything in a state, mappings included."""
    found = []
    for name, value in state.items():
        found.append((*path, name))
        if isinstance(value, dict):
            found += leaves(value, (*path, name))
    return found


def damaged_array(array: np.ndarray, rng: np.random.Generator) -> Any:
    """Another array in its place, or a few other numbers in it."""
    way = rng.integers(7)
    if way == 0:
        return np.resize(array, int(rng.integers(0, 2 * array.size + 2)))
    if way == 1:
        with np.errstate(invalid="ignore"):
            return array.astype(rng.choice(DTYPES))
    if way == 2:
        return np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape)
    if way == 3:
        return np.frombuffer(b"\xff" * array.nbytes, array.dtype).reshape(array.shape)
    if way == 4:
        return array[None] if rng.integers(2) else array.reshape(-1)[:1].reshape(())
    if way == 5:
        return NUMBERS[rng.integers(len(NUMBERS))]
    array = array.copy()
    extremes = (np.nan, np.inf, -np.inf, 1e300, -1e300, -1.0) if array.dtype.kind == "f" else (-(2**31), -2, 2**31 - 1)
    if array.size:
        with np.errstate(over="ignore"):
            array.reshape(-1)[rng.integers(array.size)] = extremes[rng.integers(len(extremes))]
    return array


def damaged(state: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A copy with one or two things changed, dropped or added."""
    state = copy.deepcopy(state)
    for _ in range(rng.integers(1, 3)):
        paths = leaves(state)
        *parents, name = paths[rng.integers(len(paths))]
        part = state
        for parent in parents:
            part = part[parent]
        value = part[name]
        if rng.integers(8) == 0:
            del part[name]
        elif isinstance(value, torch.Tensor):
            other = damaged_array(value.numpy(), rng)
            part[name] = torch.from_numpy(np.array(other)) if isinstance(other, np.ndarray) else other
        elif isinstance(value, np.ndarray):
            part[name] = damaged_array(value, rng)
        else:
            part[name] = NUMBERS[rng.integers(len(NUMBERS))]
    return state


def damaged_file(whole: bytes, rng: np.random.Generator) -> bytes:
    """The bytes of a file, cut, or with some flipped or overwritten."""
    data = bytearray(whole)
    way = rng.integers(4)
    if way == 0:
        return bytes(data[: rng.integers(len(data))])
    if way == 1:
        start = int(rng.integers(len(data)))
        data[start : start + 4096] = b"\xff" * len(data[start : start + 4096])
    else:
        for at in rng.integers(len(data) if way == 2 else 400, size=rng.integers(1, 9)):
            data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)


def main(seed: int, num_variants: int, path: Path) -> None:
    """See the module's docstring; prints how many variants were refused."""
    faulthandler.enable()
    logging.disable(logging.WARNING)
    rng = np.random.default_rng(seed)
    whole, state = path.read_bytes(), load_state(path)
    short = {"max_new_tokens": 8, "num_generations": 1}
    wanted = generate(engine_of(speculation=False), **short).completion_ids
    again = path.with_name("again.safetensors")
    refused = 0
    for variant in range(num_variants):
        print(variant, flush=True)
        if variant % 3 == 0:
            again.write_bytes(damaged_file(whole, rng))
            try:
                loaded = load_state(again)
            except ValueError:
                refused += 1
                continue
        else:
            loaded = damaged(state, rng)
            if variant % 3 == 1:  # with a checksum that fits
                try:
                    save_state(again, loaded)
                except (TypeError, ValueError):
                    continue  # no such file can be written
                loaded = load_state(again)
        try:
            engine_of().load_state_dict(loaded)
        except ValueError:
            refused += 1
        engine = engine_of()
        engine.load_state_dict(loaded, strict=False)
        assert generate(engine, **short).completion_ids == wanted
        engine.policy_updated()
        assert generate(engine, **short).completion_ids == wanted
    print(f"refused {refused} of {num_variants}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
