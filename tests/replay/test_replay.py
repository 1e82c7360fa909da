"""A replay of a recorded run gives any drafter exactly the acceptance that a live run would have given it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController, NoSpeculation
from atlas_rl.replay.costs import Costs
from atlas_rl.replay.policy import RecordedPolicy
from atlas_rl.replay.record import Recorded, RecordingSpeculator, recorded_calls
from atlas_rl.replay.replay import replay
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.drafters import recurrent_drafter
from tests.models import tiny_bigram

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 2]]
LAYERS = (0, 2)


def policy():
    return tiny_bigram(layers=3, seed=11)


class NotedHistory(HistorySpeculator):
    """Keeps what it drafted: per step the requests, the tokens and their confidence."""

    def __init__(self):
        super().__init__()
        self.drafts = []

    def propose(self, sequences, requests, max_draft_tokens):
        draft = super().propose(sequences, requests, max_draft_tokens)
        self.drafts.append([array.tolist() for array in (requests, draft.token_ids, draft.lengths, draft.confidence)])
        return draft


def live(model, speculator, folder, calls=3, **options):
    """The reports of a live run that is recorded on the way."""
    recorder = RecordingSpeculator(folder, LAYERS)
    controller = FixedController([speculator.name], speculator.name, 3)
    engine = AtlasRolloutEngine(
        model=model, speculators=[speculator, recorder], controller=controller, console=False, max_batch_size=50
    )
    reports = []
    for seed in range(calls):
        output = engine.generate(
            PROMPTS, num_generations=3, max_new_tokens=20, eos_token_ids=[17, 40], seed=seed, **options
        )
        reports.append(output.report)
        engine.policy_updated()
    return reports


def replayed(folder, speculator):
    """The reports of a replay of every call in the folder."""
    controller = FixedController([speculator.name], speculator.name, 3)
    reports, stand_in = [], None
    for number, path in enumerate(recorded_calls(folder), 1):
        recorded = Recorded.load(path)
        if stand_in is None:
            stand_in = RecordedPolicy(recorded)
            speculator.bind(stand_in, couples_noise=True)
        stand_in.follow(recorded)
        report, rollouts = replay(recorded, {speculator.name: speculator}, controller)
        reports.append(report)
        speculator.refresh(rollouts, number)
    return reports


def counts(report, name):
    """Everything that a report counts of one speculator's run."""
    return {
        "tokens": report.num_tokens,
        "forwards": report.num_forwards,
        "request_forwards": report.num_request_forwards,
        "drafted": report.drafted[name],
        "accepted": report.accepted[name],
        "by_position": report.acceptance_by_position,
        "accepted_length": report.accepted_length,
    }


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 8, "repetition_penalty": 1.2}]
)
def test_a_replay_drafts_and_accepts_exactly_what_the_live_run_did(options, tmp_path):
    noted, again = NotedHistory(), NotedHistory()
    made = live(policy(), noted, tmp_path, **options)
    answers = replayed(tmp_path, again)
    assert [counts(report, "history") for report in answers] == [counts(report, "history") for report in made]
    assert again.drafts == noted.drafts
    assert made[-1].accepted["history"] > 20


@pytest.mark.slow
def test_a_replay_of_a_drafter_that_reads_hidden_states_is_exact_up_to_their_rounding(tmp_path):
    """Hidden states are recorded in half precision, so that a head trained on them may draft a rare token otherwise."""
    made = live(policy(), recurrent_drafter(), tmp_path)
    answers = replayed(tmp_path, recurrent_drafter())
    for ours, theirs in zip(answers, made, strict=True):
        assert (ours.num_tokens, ours.num_forwards) == (theirs.num_tokens, theirs.num_forwards)
        assert ours.accepted["recurrent"] == pytest.approx(theirs.accepted["recurrent"], rel=0.02, abs=2)
        assert ours.drafted["recurrent"] == pytest.approx(theirs.drafted["recurrent"], rel=0.02, abs=2)
        assert ours.accepted_length == pytest.approx(theirs.accepted_length, rel=0.02)
    assert made[-1].accepted["recurrent"] > 20


def test_a_call_that_cannot_be_written_keeps_its_number(tmp_path, monkeypatch):
    save, calls = Recorded.save, iter(range(3))

    def failing(recorded, path):
        if next(calls) == 1:
            raise OSError("no space left on device")
        save(recorded, path)

    monkeypatch.setattr(Recorded, "save", failing)
    live(policy(), HistorySpeculator(), tmp_path)
    assert [path.stem for path in recorded_calls(tmp_path)] == ["call_0000", "call_0002"]


def test_a_drafter_without_costs_is_named(tmp_path):
    live(policy(), HistorySpeculator(), tmp_path, calls=1)
    recorded, speculator = Recorded.load(recorded_calls(tmp_path)[0]), HistorySpeculator()
    speculator.bind(RecordedPolicy(recorded), couples_noise=True)
    controller = FixedController(["history"], "history", 3)
    plain = [{"batch": 2, "context_tokens": 40, "admitted": {}, "forward_s": 1.0, "asked": {}}] * 20
    with pytest.raises(ValueError, match="the trace has no drafts of 'history'"):
        replay(recorded, {"history": speculator}, controller, Costs.of(plain))


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
        speculator.bind(RecordedPolicy(recorded), couples_noise=True)
        return replay(recorded, {"history": speculator}, controller, Costs.of(trace))[0]

    drafting = timed(FixedController(["history"], "history", 3))
    plain = timed(NoSpeculation())
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
        last = recorded.head_inputs[last_at[request] : last_at[request] + n - prompt].float()
        assert torch.allclose(last, states[-1][0, prompt - 1 : n - 1], atol=2e-2, rtol=2e-3)
        for layer in LAYERS:
            own = recorded.layers[layer][layers_at[request] : layers_at[request] + n - 1].float()
            assert torch.allclose(own, states[layer][0, : n - 1], atol=2e-2, rtol=2e-3)
    used = np.unique(np.concatenate([sequences.token_ids[r, :n] for r, n in enumerate(lengths)]))
    assert set(used) <= set(recorded.token_ids)
    index = torch.from_numpy(recorded.token_ids)
    assert torch.equal(recorded.outputs, model.get_output_embeddings().weight[index])
