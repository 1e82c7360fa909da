"""What all drafters that learn do alike, before they have a policy; tests of each drafter have the rest."""

import numpy as np
import pytest

from atlas_rl.speculators.eagle3_adaptive.speculator import AdaptiveEagle3Speculator
from atlas_rl.speculators.learning import every_other
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator


@pytest.fixture(params=["recurrent drafter", "adaptive EAGLE-3 head"])
def unbound(request):
    made = {
        "recurrent drafter": RecurrentSpeculator,
        "adaptive EAGLE-3 head": lambda: AdaptiveEagle3Speculator("a folder"),
    }
    return made[request.param](), request.param


def test_without_a_policy_there_is_nothing_to_share_or_to_save(unbound):
    speculator, _ = unbound
    speculator.learn()
    assert speculator.shared() is None
    assert speculator.state_dict() == {}
    speculator.load_state_dict({})
    assert (speculator.policy_version, speculator.refreshes) == (-1, [])


def test_a_state_needs_a_policy(unbound):
    speculator, name = unbound
    kind, version = speculator._state_format
    with pytest.raises(RuntimeError, match=f"the {name} has no policy yet"):
        speculator.load_state_dict({"kind": kind, "version": version, "policy_version": 3})
    assert speculator.policy_version == -1


def test_the_state_of_another_drafter_is_refused(unbound):
    speculator, name = unbound
    with pytest.raises(ValueError, match=f"not a state of the {name}: kind is 'other'"):
        speculator.load_state_dict({"kind": "other", "version": 1, "policy_version": 3})


@pytest.mark.parametrize(
    ("kept", "logged", "going"),
    [
        ([0, 1, 2, 3], [[0, 1, 2, 3]], [0, 2]),
        ([0, 1, 2, 3], [[1], [3, 1]], [0, 1]),  # of those that are logged, and of the others
        ([1, 3], [[3]], [3]),
        ([2], [[2]], [2]),
        ([0, 2], [], [0]),
    ],
)
def test_a_thinned_log_keeps_requests_that_are_logged(kept, logged, going):
    found = every_other(np.isin(np.arange(4), kept), [np.array(requests) for requests in logged])
    assert np.flatnonzero(found).tolist() == going
