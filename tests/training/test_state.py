"""A training resumes only where it was interrupted: with the same settings and the same data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atlas_rl.training.state import Progress, TrainingState

SAVED = {"settings": {"epochs": 2, "layers": (1, 2)}, "num_train_tokens": 100, "num_held_out_tokens": 20, "data": "a"}


def state(folder, **changes):
    head = nn.Linear(2, 2)
    return TrainingState(folder, head, torch.optim.AdamW(head.parameters()), Progress(**SAVED | changes))


@pytest.fixture
def folder(tmp_path):
    state(tmp_path).end_epoch({"loss": 1.0})
    return tmp_path


def test_the_same_training_resumes(folder):
    resumed = state(folder)
    resumed.resume()
    assert resumed.log.epochs == [{"loss": 1.0}]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": SAVED["settings"] | {"epochs": 3}}, "epochs"),
        ({"settings": {"epochs": 2}}, "layers"),
        ({"num_train_tokens": 99}, "num_train_tokens"),
        ({"num_held_out_tokens": 19, "data": "b"}, "num_held_out_tokens, data"),
    ],
    ids=str,
)
def test_other_settings_or_data_are_refused(folder, change, named):
    with pytest.raises(ValueError, match=f"other {named}: .* or delete training.safetensors and training.json in it"):
        state(folder, **change).resume()
