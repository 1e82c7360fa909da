"""A full disk, or one that cannot be written, costs what it does not take, and nothing else."""

from __future__ import annotations

import logging
import os
import subprocess
from contextlib import contextmanager, suppress

import pytest

from atlas_rl import AtlasRolloutEngine
from atlas_rl.replay.record import RecordingSpeculator, recorded_calls
from atlas_rl.report.lost_writes import LostWrites
from atlas_rl.report.sinks import read_jsonl
from atlas_rl.sync.checkpoint import save_state
from tests.engines import engine_of, generate, policy


@contextmanager
def small_disk(folder, option="rw"):
    """A file system of its own; skipped where this process may not mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=64k,{option}", "tmpfs", folder], check=False)
    if done.returncode:
        pytest.skip("mounting needs rights that this process lacks")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder):
    """Leave no byte, not even in what is allocated already."""
    for name in ("a", "b"):
        with suppress(OSError), (folder / name).open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))


def test_a_full_disk_costs_lines_and_not_the_tokens(tmp_path, caplog):
    wanted = generate(engine_of()).completion_ids
    with small_disk(tmp_path / "disk") as disk, caplog.at_level(logging.WARNING):
        recorder = RecordingSpeculator(disk / "calls")
        engine = engine_of(output_dir=disk, trace=True, speculators=[recorder])
        generate(engine)
        fill(disk)
        for _ in range(6):  # what is left of the pages of both files
            assert generate(engine).completion_ids == wanted
        engine.policy_updated()
        engine.save_drafters(disk / "new" / "state.safetensors")
        engine.save_drafters(disk / "state.safetensors")
        assert engine.lost_writes.keys() == {"report line", "controller trace", "drafter state"}
        assert engine.lost_writes["report line"] > 1
        assert recorder.lost.counts == {"recorded call": 1}
        assert caplog.text.count("a report line was lost") == 1
        assert len(engine.reports) == 7
        assert not [path for path in disk.rglob("*") if path.name.endswith(".partial")]
        for name in ("a", "b"):
            (disk / name).unlink()
        generate(engine)
        engine.policy_updated()
        assert "writing a report line works again" in caplog.text
        assert len(recorded_calls(disk / "calls")) == 1
        with pytest.warns(UserWarning, match="half-written") if _has_half_a_line(disk) else _nothing():
            rows = read_jsonl(disk / "rollouts.jsonl")
        assert rows[-1]["step"] == 7


def _has_half_a_line(disk):
    return any(line and not line.endswith(b"}") for line in (disk / "rollouts.jsonl").read_bytes().split(b"\n"))


@contextmanager
def _nothing():
    yield


@pytest.mark.parametrize("name", ["rollouts.jsonl", "controller.jsonl"])
def test_a_device_that_is_full_costs_its_lines(tmp_path, name):
    engine = engine_of(output_dir=tmp_path, trace=True)
    (tmp_path / name).symlink_to("/dev/full")
    output = generate(engine)
    assert output.completion_ids == generate(engine_of()).completion_ids
    assert engine.lost_writes == {"report line" if name == "rollouts.jsonl" else "controller trace": 1}


def test_a_folder_that_cannot_be_written_is_found_at_construction(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"output_dir='.*file.*' cannot be written to"):
            AtlasRolloutEngine(output_dir=folder)
        with pytest.raises(ValueError, match=r"folder='.*file.*' cannot be written to"):
            RecordingSpeculator(folder)
    (tmp_path / "rollouts.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"cannot be written to.*rollouts\.jsonl"):
        AtlasRolloutEngine(output_dir=tmp_path)


def test_a_read_only_or_full_disk_is_found_at_construction(tmp_path):
    with small_disk(tmp_path / "read_only", option="ro") as disk, pytest.raises(ValueError, match="Read-only"):
        AtlasRolloutEngine(output_dir=disk)
    with small_disk(tmp_path / "full") as disk:
        fill(disk)
        with pytest.raises(ValueError, match="No space left"):
            AtlasRolloutEngine(output_dir=disk)


def test_a_state_that_does_not_fit_raises_where_one_wants_to_know(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        with pytest.raises(OSError, match="state"):
            save_state(disk / "state", {"text": "a" * 100_000})
        assert not list(disk.glob("*.partial"))


def test_a_loss_is_said_once_until_writing_works_again(caplog):
    lost = LostWrites()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with lost.tolerate("line"):
                raise OSError(28, os.strerror(28))
        with lost.tolerate("line"):
            pass
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "No space left on device" in caplog.messages[0]
    assert caplog.messages[1].endswith("3 were lost")
    assert lost.counts == {"line": 3}
    with pytest.raises(ValueError, match="other"), lost.tolerate("line"):
        raise ValueError("other")


def test_engines_that_share_a_folder_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for _ in range(2):
        generate(AtlasRolloutEngine(model=policy(), console=False, output_dir=tmp_path))
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    assert len({row["engine"] for row in rows}) == len(rows) == 2
    assert [row["rank"] for row in rows] == [3, 3]
