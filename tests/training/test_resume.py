"""A repeated `atlas-rl train-speculator` keeps what the same command would make again, and nothing else."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from atlas_rl.cli import main
from tests.models import tiny_bigram
from tests.train_command import command, refused, save_policy


@pytest.fixture
def policy(tmp_path):
    return save_policy(tmp_path / "policy", tiny_bigram(layers=4, seed=11))


@pytest.fixture
def work(policy, tmp_path, capsys):
    """The work folder of a command that has run."""
    main(command(policy, tmp_path))
    capsys.readouterr()
    return tmp_path / "head" / "work"


def test_other_weights_in_the_same_folder_are_seen(work, policy, tmp_path, capsys):
    save_policy(policy, tiny_bigram(layers=4, seed=11))
    main(command(policy, tmp_path))  # the same weights, written again
    save_policy(policy, tiny_bigram(layers=4, seed=12))
    assert "made with other weights: give another --output" in refused(capsys, command(policy, tmp_path))


def test_other_settings_keep_the_continuations(work, policy, tmp_path, capsys, monkeypatch):
    options = ["--epochs", 2, "--learning-rate", 2e-3]
    with monkeypatch.context() as nothing_loads:
        nothing_loads.setattr(AutoModelForCausalLM, "from_pretrained", None)
        line = refused(capsys, command(policy, tmp_path, *options))
    assert "a training with other epochs, learning_rate: " in line
    assert "delete training.safetensors and training.json in it" in line
    for name in ("training.safetensors", "training.json"):
        (work / name).unlink()
    main(command(policy, tmp_path, *options))
    printed = capsys.readouterr().out
    assert "tok/s" not in printed
    assert "epoch 2/2" in printed


def test_an_interruption_before_the_log_is_written_is_made_up_for(work, policy, tmp_path):
    log = (work / "training.json").read_text()
    (work / "training.json").unlink()
    main(command(policy, tmp_path))
    assert (work / "training.json").read_text() == log


def test_continuations_that_cannot_be_written_end_the_command(policy, tmp_path, capsys):
    blocked = tmp_path / "head" / "work" / "rollouts" / "call_0002.safetensors.partial"
    blocked.mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        main(command(policy, tmp_path))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "call_0002.safetensors' could not be written: free space, and repeat the command" in printed.err
    assert "epoch" not in printed.out
    blocked.rmdir()
    main(command(policy, tmp_path))
    assert capsys.readouterr().out.count("tok/s") == 2


def test_a_damaged_head_of_ours_is_replaced(work, policy, tmp_path, capsys):
    config = tmp_path / "head" / "config.json"
    whole = config.read_text()
    config.write_text(whole[:40])
    main(command(policy, tmp_path))
    assert json.loads(config.read_text()) == json.loads(whole)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(whole[:40])
    assert "is not JSON" in refused(capsys, command(policy, tmp_path, "--output", tmp_path / "other"))
