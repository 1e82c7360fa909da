"""A recorded run answers for every drafter what a live run would have: exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.replay.replay import Costs, Recorded, RecordingSpeculator, ReplayPolicy, recorded_calls, replay
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.models import tiny_bigram
from tests.speculators.test_recurrent import drafter

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 2]]
LAYERS = (0, 2)


def policy():
    return tiny_bigram(layers=3, seed=11)


def live(model, speculator, folder, calls=3):
    """Accepted lengths and drafts of a live run that is recorded on the way."""
    recorder = RecordingSpeculator(folder, LAYERS)
    controller = FixedController([speculator.name], speculator.name, 3)
    engine = AtlasRolloutEngine(
        model=model, speculators=[speculator, recorder], controller=controller, console=False, max_batch_size=50
    )
    reports = []
    for seed in range(calls):
        output = engine.generate(PROMPTS, num_generations=3, max_new_tokens=20, eos_token_ids=[17, 40], seed=seed)
        reports.append(output.report)
        engine.policy_updated()
    return reports


def replayed(folder, speculator):
    controller = FixedController([speculator.name], speculator.name, 3)
    reports, stand_in = [], None
    for number, path in enumerate(recorded_calls(folder), 1):
        recorded = Recorded.load(path)
        if stand_in is None:
            stand_in = ReplayPolicy(recorded)
            speculator.bind(stand_in)
        stand_in.follow(recorded)
        report, rollouts = replay(recorded, {speculator.name: speculator}, controller)
        reports.append(report)
        speculator.refresh(rollouts, number)
    return reports


@pytest.mark.parametrize("kind", [HistorySpeculator, drafter])
def test_a_replay_drafts_and_accepts_what_the_live_run_did(kind, tmp_path):
    made = live(policy(), kind(), tmp_path)
    again = replayed(tmp_path, kind())
    for a, b in zip(made, again, strict=True):
        assert (a.num_tokens, a.num_forwards) == (b.num_tokens, b.num_forwards)
        # Hidden states are recorded in half precision: a rare draft of the head may differ.
        assert sum(a.accepted.values()) == pytest.approx(sum(b.accepted.values()), rel=0.02, abs=2)
        assert sum(a.drafted.values()) == pytest.approx(sum(b.drafted.values()), rel=0.02, abs=2)
        assert a.accepted_length == pytest.approx(b.accepted_length, rel=0.02)
    assert sum(made[-1].accepted.values()) > 20


def test_costs_give_a_replay_the_time_of_the_machine_they_were_fitted_to(tmp_path):
    live(policy(), HistorySpeculator(), tmp_path, calls=1)
    recorded = Recorded.load(recorded_calls(tmp_path)[0])
    trace = [
        {
            "batch": batch, "context_tokens": 20 * batch, "admitted": {"history": slots},
            "forward_s": 1.0 + 0.1 * (batch + slots), "asked": {"history": {"requests": batch, "depth": 3, "seconds": 0.5}},
        }
        for batch in (1, 4, 9) for slots in (0, 3, 9, 27) for _ in range(20)
    ]  # fmt: skip

    def timed(controller):
        speculator = HistorySpeculator()
        speculator.bind(ReplayPolicy(recorded))
        return replay(recorded, {"history": speculator}, controller, Costs.of(trace))[0]

    drafting = timed(FixedController(["history"], "history", 3))
    plain = timed(GoodputController(()))
    assert plain.forward_s == pytest.approx(plain.num_forwards + 0.1 * plain.num_request_forwards, rel=0.05)
    assert drafting.forward_s > drafting.num_forwards + 0.1 * drafting.num_request_forwards
    # The last steps have no room to draft.
    assert 0.5 * (drafting.num_forwards - 3) <= drafting.draft_s + 1e-6 <= 0.5 * drafting.num_forwards + 1e-5
    assert drafting.num_request_forwards < plain.num_request_forwards


def test_the_record_holds_what_a_plain_forward_computes(tmp_path):
    model = policy()
    live(model, HistorySpeculator(), tmp_path, calls=1)
    recorded = Recorded.load(recorded_calls(tmp_path)[0])
    sequences = recorded.sequences
    lengths, prompts = sequences.lengths, sequences.prompt_lengths
    last_at, layers_at = np.cumsum(lengths - prompts) - (lengths - prompts), np.cumsum(lengths - 1) - (lengths - 1)
    for request in range(len(lengths)):
        n, prompt = int(lengths[request]), int(prompts[request])
        tokens = torch.from_numpy(sequences.token_ids[request, :n].astype(np.int64))[None]
        with torch.no_grad():
            states = model(tokens, output_hidden_states=True).hidden_states
        last = recorded.last[last_at[request] : last_at[request] + n - prompt].float()
        assert torch.allclose(last, states[-1][0, prompt - 1 : n - 1], atol=2e-2, rtol=2e-3)
        for layer in LAYERS:
            own = recorded.layers[layer][layers_at[request] : layers_at[request] + n - 1].float()
            assert torch.allclose(own, states[layer][0, : n - 1], atol=2e-2, rtol=2e-3)
    used = np.unique(np.concatenate([sequences.token_ids[r, :n] for r, n in enumerate(lengths)]))
    assert set(used) <= set(recorded.token_ids)
    index = torch.from_numpy(recorded.token_ids)
    assert torch.equal(recorded.outputs, model.get_output_embeddings().weight[index])


def test_wrong_files_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="no recorded rollouts"):
        recorded_calls(tmp_path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "call_0000.safetensors")
    with pytest.raises(ValueError, match="no recorded rollouts"):
        Recorded.load(tmp_path / "call_0000.safetensors")
