"""Recordings: what is written is complete, and what is read is named if it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atlas_rl import AtlasRolloutEngine
from atlas_rl.core import Hidden, Prompts
from atlas_rl.replay.record import Recorded, RecordingSpeculator, recorded_calls
from atlas_rl.speculators.base import NO_PROMPTS
from tests.models import tiny_bigram

PROMPTS, LAYERS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 2]], (0, 2)


class PromptsFromACache(RecordingSpeculator):
    """Records with an engine that runs only some prompts, as vLLM does when it finds the others in its prefix cache."""

    def __init__(self, folder, ran):
        super().__init__(folder, LAYERS)
        self.ran = ran

    def start(self, sequences, requests, prompts=NO_PROMPTS, cache=None):
        groups, hidden = prompts.groups[: self.ran], prompts.hidden
        super().start(
            sequences, requests, Prompts(groups, Hidden(hidden.starts[: self.ran], None, hidden.layers)), cache
        )


def record(recorder):
    engine = AtlasRolloutEngine(
        model=tiny_bigram(layers=3, seed=11), speculators=[recorder], console=False, max_batch_size=50
    )
    engine.generate(PROMPTS, num_generations=2, max_new_tokens=8, eos_token_ids=[17, 40], seed=0)
    engine.policy_updated()


def test_requests_without_their_prompts_states_are_left_out(tmp_path, caplog):
    record(RecordingSpeculator(tmp_path / "whole", LAYERS))
    record(PromptsFromACache(tmp_path / "some", 2))
    whole, some = (Recorded.load(recorded_calls(tmp_path / name)[0]) for name in ("whole", "some"))
    kept = np.flatnonzero(np.isin(whole.sequences.noise_keys, some.sequences.noise_keys))
    assert 0 < len(kept) == len(some.sequences.lengths) < len(whole.sequences.lengths)
    assert f"with {len(kept)} of {len(whole.sequences.lengths)} requests" in caplog.text
    assert "enable_prefix_caching=False" in caplog.text
    ends = np.cumsum(whole.sequences.lengths - 1)
    for layer in LAYERS:
        parts = np.split(whole.layers[layer].numpy(), ends[:-1])
        assert np.array_equal(some.layers[layer].numpy(), np.concatenate([parts[request] for request in kept]))


def test_a_call_without_a_whole_request_is_not_written(tmp_path):
    recorder = PromptsFromACache(tmp_path, 0)
    record(recorder)
    assert recorder.next_call == 1
    with pytest.raises(ValueError, match="no recorded rollouts"):
        recorded_calls(tmp_path)


def test_calls_are_in_the_order_of_their_numbers(tmp_path):
    numbers = [9, 999, 1000, 1001, 9999, 10_000, 10_001]
    recorder = RecordingSpeculator(tmp_path)
    for number in reversed(numbers):
        recorder.file_of(number).touch()
    (tmp_path / "call_of_mine.safetensors").touch()
    assert recorded_calls(tmp_path) == [recorder.file_of(number) for number in numbers]


@pytest.fixture
def file(tmp_path):
    record(RecordingSpeculator(tmp_path, LAYERS))
    return recorded_calls(tmp_path)[0]


def rewritten(file, change):
    """Write a recorded call again with other tensors."""
    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors, _: tensors.pop("last"), "'last'"),
        (
            lambda tensors, _: tensors.update({"layer.2": tensors["layer.2"][:-1].clone()}),
            "layer 2 has .* rows instead of",
        ),
        (lambda tensors, _: tensors.update(last=tensors["last"][1:].clone()), "drawn from has .* rows instead of"),
        (lambda tensors, _: tensors.update(biases=torch.zeros(1)), "biases has 1 rows"),
        (lambda tensors, _: tensors.update(token_ids=tensors["token_ids"][0].clone()), "out of range"),
        (lambda _, metadata: metadata.update(sampling="{"), "Expecting"),
        (lambda _, metadata: metadata.update(sampling="[]"), "list indices"),
        (lambda _, metadata: metadata.update(vocab_size="many"), "invalid literal"),
    ],
)
def test_damaged_calls_are_named(file, change, reason):
    rewritten(file, change)
    with pytest.raises(
        ValueError, match=rf"'{file}' is damaged \(.*{reason}.*\): delete it, and record that call anew"
    ):
        Recorded.load(file)


@pytest.mark.parametrize("size", [0, 3, 500])
def test_calls_that_were_cut_off_are_named(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"'{file}' is damaged"):
        Recorded.load(file)


def test_wrong_files_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="no recorded rollouts"):
        recorded_calls(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "call_0000.safetensors")
    with pytest.raises(ValueError, match="no recorded rollouts"):
        Recorded.load(tmp_path / "call_0000.safetensors")
