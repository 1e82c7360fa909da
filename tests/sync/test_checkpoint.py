"""The drafters' saved state: whole or refused, whatever a disk did to it."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atlas_rl.integrations.trl.drafter_state import DrafterStateCallback
from atlas_rl.sync.checkpoint import FILE_NAME, drop_ranks, file_of_rank, file_to_resume, load_state, save_state
from tests import ROOT
from tests.engines import engine_of, generate

STATE = {
    "history": {"archive": {"tokens": np.arange(5, dtype=np.int32)}, "kind": "a", "empty": {}, "none": None},
    "recurrent": {"weights": {"w": torch.ones(2, 3, dtype=torch.bfloat16), "step": torch.tensor(3.0)}, "trained": 1},
    "unsigned": np.arange(3, dtype=np.uint64),
    "nothing": np.zeros(0, np.float64),
}


@pytest.fixture(scope="module")
def state():
    engine = engine_of()
    generate(engine)
    engine.policy_updated()
    return engine.state_dict()


def with_change(state, path, value):
    *parents, name = path.split("/")
    changed = {**state}
    part = changed
    for parent in parents:
        part[parent] = {**part[parent]}
        part = part[parent]
    part[name] = value(part[name]) if callable(value) else value
    return changed


def test_a_state_comes_back_as_it_went(tmp_path):
    path = tmp_path / "new" / "state.safetensors"
    save_state(path, STATE)
    back = load_state(path)
    assert back["history"]["empty"] == {}
    assert back["history"]["none"] is None
    assert back["recurrent"]["trained"] == 1
    assert torch.equal(back["recurrent"]["weights"]["w"], STATE["recurrent"]["weights"]["w"])
    assert back["recurrent"]["weights"]["step"].shape == ()
    for name in ("unsigned", "nothing"):
        assert back[name].dtype == STATE[name].dtype
        assert np.array_equal(back[name], STATE[name])
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("at", [-1, -30, 60, 9])
def test_one_flipped_bit_is_seen(tmp_path, at):
    path = tmp_path / "state.safetensors"
    save_state(path, STATE)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"state\.safetensors' (is damaged|is no file|holds no drafter state)"):
        load_state(path)


def test_files_that_are_none_are_named(tmp_path):
    path = tmp_path / "state.safetensors"
    for content in (b"", b"\xff" * 4096, b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is no file that save_drafters\(\) wrote, or is damaged"):
            load_state(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "atlas_rl.speculators.1", "values": "{}"})
    with pytest.raises(ValueError, match=r"no drafter state of this version.*speculators\.1"):
        load_state(path)
    with pytest.raises(ValueError, match="or is damaged"):
        load_state(tmp_path)
    with pytest.raises(ValueError, match="or is damaged"):
        load_state(tmp_path / "missing")


def test_changed_numbers_do_not_fit_the_checksum(tmp_path, state):
    path = tmp_path / "state.safetensors"
    save_state(path, state)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    tensors["history/model/log_weights"][0, 0] = float("nan")
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="checksum"):
        load_state(path)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("history/model/log_weights", lambda x: np.full_like(x, np.nan), "log_weights has values that are not finite"),
        ("history/model/log_weights", lambda x: x[:1], "log_weights has shape"),
        ("history/model/escapes", lambda x: x.astype(complex), "escapes is of type complex128"),
        ("history/model/exponents", lambda x: x - 1e9, "exponents has values"),
        ("history/archive/tokens", lambda x: x + 64, "tokens has values"),
        ("history/archive/tokens", lambda x: x.astype(np.float32), "tokens is of type float32"),
        ("history/archive/tokens", lambda x: x[1:], "tokens and .* infos"),
        ("history/archive/infos", lambda x: np.full_like(x, -1), "no prompt tags"),
        ("history/archive/capacity", -5, "capacity is -5"),
        ("history/archive/capacity", 2**40, "capacity is"),
        ("history/archive", 3, "archive: the state is a int"),
        ("history/policy_version", 1.5, "policy_version is 1.5"),
        ("history", [1], "the state is a list"),
        ("recurrent/ids", lambda x: x[::-1].copy(), "ids is not sorted"),
        ("recurrent/ids", lambda x: x + 1000, "ids has values"),
        ("recurrent/counts", lambda x: -x, "counts has values"),
        ("recurrent/counts", lambda x: x[:-1], "counts has shape"),
        ("recurrent/trained", "yes", "trained is 'yes'"),
        ("recurrent/weights/bias", lambda x: x[:-1], "bias has shape"),
        ("recurrent/weights/read.weight", lambda x: x * float("inf"), "read.weight has values"),
        ("recurrent/weights/read.weight", lambda x: x.to(torch.int32), "read.weight is of type int32"),
        ("recurrent/weights", {}, "the weights are"),
        ("recurrent/optimizer", {"99": {}}, "the optimizer has parameters"),
        ("recurrent/optimizer/1/exp_avg_sq", lambda x: x - 1, "exp_avg_sq has values"),
        ("recurrent/vocab_size", None, "vocab_size is None"),
    ],
)
def test_a_damaged_part_is_named_and_changes_nothing(state, caplog, path, value, named):
    bad, name = with_change(state, path, value), path.partition("/")[0]
    engine = engine_of()
    engine.load_state_dict(state)
    before = repr(engine.state_dict()[name])
    with pytest.raises(ValueError, match=named):
        engine.load_state_dict({name: bad[name]})
    assert repr(engine.state_dict()[name]) == before
    # Who does not want to know goes on, with the other drafter restored.
    fresh = engine_of()
    with caplog.at_level(logging.WARNING):
        fresh.load_state_dict(bad, strict=False)
    assert f"the drafter '{name}'" in caplog.text
    own = fresh.state_dict()
    assert (len(own["history"]["archive"]["tokens"]) > 0) == (name != "history")
    assert own["recurrent"]["trained"] == (name != "recurrent")


def test_a_bad_state_that_waits_for_the_first_rollout_does_not_stop_it(tmp_path, state, caplog):
    path = tmp_path / "state.safetensors"
    save_state(path, {**state, "history": {**state["history"], "model": {}}, "mute": {"depth": 3}})
    wanted = generate(engine_of()).completion_ids
    engine = engine_of()
    engine._speculators = None  # as an attached engine is before its first rollout
    with caplog.at_level(logging.WARNING):
        engine.load_drafters(path)
        assert generate(engine).completion_ids == wanted
    assert "the state has no log_weights" in caplog.text
    assert "['mute'] that this engine lacks" in caplog.text
    assert engine.state_dict()["recurrent"]["trained"]


@pytest.mark.parametrize("content", [b"print('a script')\n", b""])
def test_a_file_that_is_none_is_refused_where_it_is_asked_for_and_does_not_stop_a_training(tmp_path, content, caplog):
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no file that save_drafters\(\) wrote, or is damaged") as refused:
        engine_of().load_drafters(path)
    assert "delete" not in str(refused.value)
    with caplog.at_level(logging.WARNING):
        DrafterStateCallback(engine_of(), None)._load(path)
    assert "All drafters start afresh" in caplog.text


@pytest.mark.slow
def test_no_damage_ends_the_process(tmp_path, state):
    path = tmp_path / "state.safetensors"
    save_state(path, state)
    command = [sys.executable, "-m", "tests.sync.damage", "1", "30", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-3000:]
    assert int(done.stdout.split()[-3]) > 20


def test_each_rank_resumes_from_its_own_file(tmp_path):
    for rank in range(3):
        file_of_rank(tmp_path, rank).touch()
    assert [file_to_resume(tmp_path, rank) for rank in range(3)] == [file_of_rank(tmp_path, rank) for rank in range(3)]
    assert file_of_rank(tmp_path, 0).name == FILE_NAME, "the file of a training with one process"


def test_where_ranks_have_changed_others_files_serve(tmp_path):
    assert file_to_resume(tmp_path, 1) is None
    for rank in (0, 2):
        file_of_rank(tmp_path, rank).touch()
    (tmp_path / "atlas_rl.rankx.safetensors").touch()
    chosen = [file_to_resume(tmp_path, rank) for rank in range(4)]
    assert chosen == [file_of_rank(tmp_path, rank) for rank in (0, 2, 2, 2)]
    drop_ranks(tmp_path, 2)
    assert [file_to_resume(tmp_path, rank) for rank in range(3)] == 3 * [file_of_rank(tmp_path, 0)]
