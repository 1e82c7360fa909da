"""What an engine keeps and leaves behind: policy versions, saved state."""

from __future__ import annotations

import pytest

from atlas_rl import AtlasRolloutEngine
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.drafters import RandomDrafter
from tests.engines import engine_of, fixed, generate, policy


def test_a_policy_update_moves_the_version_and_refreshes():
    class Listener(RandomDrafter):
        refreshed = ()

        def refresh(self, rollouts, policy_version):
            self.refreshed += ((len(rollouts.sequences.lengths), rollouts.sequences.policy_version, policy_version),)

    listener = Listener()
    engine = engine_of(speculators=[listener])
    engine.policy_updated()  # nothing to learn from yet
    assert engine.policy_version == 1
    assert generate(engine).report.policy_version == 1
    engine.policy_updated()
    assert generate(engine, [[1]]).report.policy_version == 2
    engine.policy_updated(version=7)
    output = generate(engine)
    assert output.report.policy_version == 7
    assert output.report.refresh_s > 0
    assert listener.refreshed == ((10, 1, 2), (2, 2, 7))
    assert generate(engine).report.refresh_s == 0


def test_the_history_learns_from_one_step_to_the_next():
    engine = fixed(HistorySpeculator(), 6)
    first = generate(engine).report
    engine.policy_updated()
    assert generate(engine).report.accepted_length > first.accepted_length + 0.5


def test_state_makes_a_resumed_run_draft_as_well():
    engine = fixed(HistorySpeculator(), 6)
    generate(engine)
    engine.policy_updated()
    state = engine.state_dict()
    assert set(state) == {"history"}
    first, resumed, cold = generate(engine), fixed(HistorySpeculator(), 6), fixed(HistorySpeculator(), 6)
    resumed.load_state_dict(state)
    again = generate(resumed)
    assert again.completion_ids == first.completion_ids
    assert again.report.accepted == first.report.accepted
    assert generate(cold).report.accepted["history"] < again.report.accepted["history"]


def test_state_waits_for_an_engine_that_has_not_met_its_policy():
    engine = engine_of()
    generate(engine)
    state = engine.state_dict()
    attached = AtlasRolloutEngine(console=False)
    attached.load_state_dict(state)
    assert attached.state_dict() == state
    attached.model = policy()  # what `attach` passes with every rollout
    generate(attached, [[1]], max_new_tokens=1)
    history = attached._speculators["history"]
    assert history.num_archived_tokens == engine._speculators["history"].num_archived_tokens > 0


def test_the_state_of_another_speculator_is_refused():
    with pytest.raises(ValueError, match=r"\['mute'\].*lacks.*history"):
        engine_of().load_state_dict({"mute": {"depth": 3}})
    engine_of().load_state_dict({"mute": {}})  # it had nothing to restore


def test_a_state_that_does_not_fit_is_refused_at_every_rollout():
    """No rollout may begin with drafters of which some were restored."""
    engine = AtlasRolloutEngine(console=False)
    engine.load_state_dict({"mute": {"depth": 3}})
    engine.model = policy()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\['mute'\].*lacks"):
            generate(engine, [[1]], max_new_tokens=1)
    engine.load_state_dict({})
    generate(engine, [[1]], max_new_tokens=1)


def test_a_state_that_was_handed_over_is_kept_no_longer():
    engine = engine_of()
    generate(engine)
    attached = AtlasRolloutEngine(console=False)
    attached.load_state_dict(engine.state_dict())
    attached.model = policy()
    generate(attached, [[1]], max_new_tokens=1)
    assert attached._restored == {}


def test_a_trainers_step_is_the_version_unless_that_is_taken():
    engine = engine_of()
    versions = []
    for step in (0, 0, 1, 5, 0, 1, 5, 20):
        engine.policy_updated(step=step)
        versions.append(generate(engine, [[1]], max_new_tokens=1).report.policy_version)
    assert versions == [0, 1, 2, 5, 6, 7, 8, 20]


def test_a_version_that_cannot_be_kept_is_refused():
    engine = engine_of()
    with pytest.raises(ValueError, match="a whole number up to 2147483647"):
        engine.policy_updated(2**31)
    engine.policy_updated(2**31 - 1)
    generate(engine, [[1]], max_new_tokens=1)
    with pytest.raises(ValueError, match="none above 2147483647 can be kept"):
        engine.policy_updated()
    assert engine.policy_version == 2**31 - 1
