"""The GPU benchmarks run, on a pretended GPU and a tiny policy: whoever has a GPU finds no error of ours in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.gpu import decode, drafts, kernels, peers, waiting
from benchmarks.gpu.policy import SIZES, new_policy, texts, train
from tests.pretend_cuda import PretendCuda

pytestmark = pytest.mark.usefixtures("probed_once")

VOCAB, EOS = 128, 2


@pytest.fixture
def cuda():
    with PretendCuda(graphs=True) as device:
        yield device


def tiny(cuda):
    return cuda.move(new_policy("tiny", VOCAB, dtype=torch.bfloat16))


@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (3, 2)])
def test_a_step_is_timed_eagerly_and_captured(batch, queries, cuda):
    row = decode.step_and_graph(tiny(cuda), batch, queries, 8)
    assert row["captured"] == 1
    assert {"eager_ms", "captured_ms", "capture_s"} <= set(row)


def test_arms_take_turns(cuda):
    model = tiny(cuda)
    own, prompts = decode.engines(model), decode.Prompts([[5, 9, 3], [7, 7, 8, 1]])
    for name, engine in own.items():
        decode.warm(engine, prompts, EOS, 2 if name == "recurrent" else 1, 6, 8)
    rows = decode.cell(model, own, prompts, EOS, 8, list(own), 1, 6)
    assert [row["arm"] for row in rows] == list(own)
    assert all(row["step_ms"] > 0 for row in rows)


@pytest.mark.parametrize("sampling", ["plain", "truncated"])
def test_drafts_are_timed_eagerly_and_captured(sampling, cuda, monkeypatch):
    monkeypatch.setattr(drafts, "HIDDEN", 32)
    row = drafts.row((16, 40), 3, sampling)
    assert row["refused"] is None
    assert row["capture_s"] > 0


def test_kernels_are_timed(cuda, monkeypatch):
    monkeypatch.setattr(kernels, "VOCAB", 300)
    rows = kernels._verify_rows(4, 1e9) + kernels._truncate_rows(4, 1e9)
    assert {row["kernel"] for row in rows} >= {"verify", "verify_by_rejection", "truncate, top-p", "torch operations"}


@pytest.mark.parametrize("arm", peers.ARMS)
def test_peers_generate(arm):
    """On a CPU: continuous batching asks the device what the pretended one does not answer."""
    run = peers.run_of(arm, new_policy("tiny", VOCAB), 5)
    assert [len(row) for row in run([[5, 9, 3], [7, 8, 1]], 0)] == [5, 5]


def test_the_policy_of_the_figures_learns(tmp_path):
    rows = np.arange(600, dtype=np.uint16) % VOCAB
    path = tmp_path / "texts.npz"
    np.savez(path, trained=rows, trained_lengths=np.array([300, 300]))
    model = new_policy("tiny", VOCAB)
    losses = train(model, texts(path, "trained"), 0.3, 64, "cpu")
    assert np.isfinite(losses).all()
    assert not model.training


def test_all_that_waits_fits_the_time_of_a_loan(tmp_path):
    parts = waiting.parts_of(tmp_path, "abc", rehearsal=False)
    assert waiting.BUDGET_S < 600
    assert sum(part.limit_s for part in parts[:5]) <= waiting.BUDGET_S
    assert "0.6b" in SIZES
    assert all(any("abc" in argument for argument in part.arguments) for part in parts[3:5])


@pytest.mark.parametrize(("code", "outcome"), [("print('found')", 0), ("import sys; sys.exit(3)", 3)])
def test_a_part_that_fails_is_told(code, outcome, tmp_path, capsys, monkeypatch):
    (tmp_path / "told.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = waiting.run(waiting.Part("told", 60, ("told",)), 60, tmp_path)
    assert row["outcome"] == outcome
    assert f"--- told: {row['seconds']:.0f} s, {outcome}" in capsys.readouterr().out


def test_a_part_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("print('begun', flush=True)\nimport time\ntime.sleep(60)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = waiting.run(waiting.Part("slow", 60, ("slow",)), 2.0, tmp_path)
    assert row["outcome"] == "stopped after 2 s"
    assert row["seconds"] < 20
    assert (tmp_path / "slow.log").read_text(encoding="utf-8") == "begun\n"
