"""A static head is trained on the policy's device, here a pretended one, and learns what it learns on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.policy.view import InProcessView
from atlas_rl.replay.record import RecordingSpeculator, recorded_calls
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.training.eagle3 import TrainSettings, train
from tests.gpu.engines import PROMPTS, policy
from tests.pretend_cuda import PretendCuda

LAYERS = (0, 1)


@pytest.fixture
def calls(tmp_path: Path) -> list[Path]:
    recorder = RecordingSpeculator(tmp_path / "calls", LAYERS)
    engine = AtlasRolloutEngine(model=policy(), speculators=[HistorySpeculator(), recorder], console=False)
    for seed in range(3):
        engine.generate(PROMPTS, num_generations=2, max_new_tokens=12, eos_token_ids=[17], seed=seed)
        engine.policy_updated()
    return recorded_calls(tmp_path / "calls")


def trained(calls: list[Path], folder: Path, move: Callable[[torch.nn.Module], Any]) -> tuple[Any, dict[str, Any]]:
    """The head after two passes, and what its training said of the second one."""
    settings = TrainSettings(layers=LAYERS, draft_vocab_size=60, unroll=2, epochs=2, batch_size=4)
    head = train(InProcessView(move(policy())), calls, folder, settings, say=lambda line: None)
    return head, json.loads((folder / "training.json").read_text())["epochs"][-1]


def test_a_head_learns_on_a_device_what_it_learns_on_a_cpu(calls: list[Path], tmp_path: Path) -> None:
    expected, told = trained(calls, tmp_path / "cpu", lambda module: module)
    with PretendCuda() as cuda:
        head, found = trained(calls, tmp_path / "cuda", cuda.move)
        assert {weight.device.type for weight in head.parameters()} == {"cuda"}
        again, _ = trained(calls, tmp_path / "cuda", cuda.move)  # resumes after the last pass
        for name, weight in expected.state_dict().items():
            assert torch.allclose(head.state_dict()[name].cpu().float(), weight.float(), atol=1e-4), name
            assert torch.equal(again.state_dict()[name].cpu(), head.state_dict()[name].cpu()), name
    assert found["loss"] == pytest.approx(told["loss"], rel=1e-3)
    assert found["acceptance"] == pytest.approx(told["acceptance"], rel=1e-3)
