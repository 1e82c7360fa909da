"""The figures reach TensorBoard, W&B and Trackio by the trainer's own `report_to`, on this machine alone.

A backend that is not installed is skipped: `make test` installs TensorBoard.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from atlas_rl import AtlasRolloutEngine
from tests.models import tiny_llama
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer

STEPS = 2


def needs(package: str) -> pytest.MarkDecorator:
    """Looks without an import, which would settle where a backend writes."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def train(backend: str, folder: Path) -> dict[str, list[float]]:
    """A few steps that report to a backend; the `atlas/...` figures that it must have, one per step each."""
    policy = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    options: Any = {"max_steps": STEPS, "report_to": backend, "run_name": "figures", "project": "atlas-test"}
    trainer = build_trainer("grpo", policy, word_tokenizer(), folder, **options)
    AtlasRolloutEngine(console=False).attach(trainer, baseline_every=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == STEPS
    # A drafter's figures begin with the step in which it first drafts.
    names = [name for name in logged[0] if name.startswith("atlas/") and all(name in entry for entry in logged)]
    assert {"atlas/tokens_per_s", "atlas/accepted_length", "atlas/speedup_measured", "atlas/acceptance_at/0"} <= {
        *names
    }
    return {f"train/{name}": [entry[name] for entry in logged] for name in names}


@needs("tensorboard")
def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    expected = train("tensorboard", tmp_path)
    (file,) = (tmp_path / "board").rglob("events.out*")
    board = EventAccumulator(str(file.parent)).Reload()
    for name, values in expected.items():
        assert [event.value for event in board.Scalars(name)] == pytest.approx(values), name


@needs("wandb")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    try:
        expected = train("wandb", tmp_path)
        last = {name: wandb.run.summary[name] for name in expected}
    finally:
        wandb.finish()
    assert last == pytest.approx({name: values[-1] for name, values in expected.items()})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@needs("trackio")
def test_trackio_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("trackio.sqlite_storage")
    # TRACKIO_DIR is read when trackio is imported, which TRL has done by now.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio" and "TRACKIO_DIR" in vars(module):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    expected = train("trackio", tmp_path)
    (database,) = (tmp_path / "trackio").glob("*.db")  # its documented layout: a table `metrics` of JSON texts
    with closing(sqlite3.connect(database)) as connection:
        rows = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    for name, values in expected.items():
        assert [row[name] for row in rows if name in row] == pytest.approx(values), name
