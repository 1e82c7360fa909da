"""Where things are: drafters follow the policy, and what cannot run says so before any work."""

from __future__ import annotations

import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.core import Draft
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from tests.drafters import RandomDrafter
from tests.gpu.engines import (
    ARMS,
    VOCAB,
    calls_before_drafts,
    draft_lm,
    eagle3_head,
    engine_of,
    generate,
    num_drafted,
    policy,
    tokens_of,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("probed_once")


def stay(module):
    return module


def to_cuda(module):
    """As a trainer moves its policy."""
    return module.to("cuda")


@pytest.mark.parametrize("move", [to_cuda, "emulated"], ids=["by to()", "in place"])
@pytest.mark.parametrize("arm", ["recurrent", "eagle3"])
def test_the_policy_may_move_after_the_engine_is_made(arm, move, cuda):
    model = policy()
    engine = engine_of(model, ARMS[arm](stay))
    (cuda.move if move == "emulated" else move)(model)
    outputs = generate(engine, 1 + calls_before_drafts(arm), max_new_tokens=3)
    assert num_drafted(outputs) > 0


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("plain", "history")])  # those with tensors
def test_the_policy_may_move_between_calls_and_back(arm, cuda):
    """What was learned on one device is not lost on the other, nor are rollouts that wait to be learned from."""
    model, calls = policy(), 1 + calls_before_drafts(arm)
    engine = engine_of(model, ARMS[arm](stay))
    before = generate(engine, calls, max_new_tokens=3)
    to_cuda(model)
    engine.generate([[3, 8, 1]], max_new_tokens=3, eos_token_ids=(), seed=1)
    model.to("cpu")
    engine.generate([[3, 8, 1]], max_new_tokens=3, eos_token_ids=(), seed=2)
    engine.policy_updated()
    to_cuda(model)
    after = generate(engine, max_new_tokens=3, seed=calls - 1)
    assert tokens_of(after)[0] == tokens_of(before)[-1]
    assert not engine.reports[-1].drafter_faults
    assert all(sum(report.drafted.values()) > 0 for report in engine.reports[calls:])


def test_a_refresh_after_a_move_learns_from_what_was_generated_before_it(cuda):
    model, speculator = policy(), ARMS["recurrent"](stay)
    engine = engine_of(model, speculator)
    engine.generate([[3, 8, 1]], max_new_tokens=6, eos_token_ids=())
    to_cuda(model)
    engine.meet(model)
    engine.policy_updated()
    assert len(speculator.refreshes) == 1
    assert num_drafted(generate(engine, max_new_tokens=3)) > 0


GIVEN = {
    "eagle3": lambda: Eagle3Speculator(eagle3_head()),
    "eagle3 in bf16": lambda: Eagle3Speculator(eagle3_head().to(torch.bfloat16)),
    "draft_lm": lambda: DraftLM(draft_lm(), VOCAB),
}


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("given", GIVEN)
def test_networks_may_be_handed_over_on_the_cpu(given, verification, cuda):
    outputs = generate(engine_of(cuda.move(policy()), GIVEN[given](), verification=verification), max_new_tokens=3)
    assert num_drafted(outputs) > 0


class Elsewhere(RandomDrafter):
    """Its draft probabilities are on the CPU, wherever the policy is."""

    def propose(self, sequences, requests, max_draft_tokens) -> Draft:
        draft = super().propose(sequences, requests, max_draft_tokens)
        assert draft.draft_probs.device.type == "cpu"
        return draft


def test_a_drafter_of_the_users_may_work_elsewhere(cuda):
    drafter = Elsewhere(with_probs=True)
    outputs = generate(engine_of(cuda.move(policy()), drafter, verification="rejection"), max_new_tokens=3)
    assert num_drafted(outputs) > 0


# ---------------------------------------------------------------------------------------------------- several devices


def device_map(model):
    """What accelerate leaves at a policy that it has spread over two GPUs."""
    model.hf_device_map = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.norm": 1,
        "lm_head": 1,
    }
    return model


def one_layer(model):
    model.model.layers[1].to("cuda")
    return model


SPREAD = {"device_map": (device_map, "0, 1"), "one layer": (one_layer, "cpu, cuda:0")}


@pytest.mark.parametrize("spread", SPREAD)
def test_a_policy_over_several_devices_is_refused_before_any_work(spread, cuda):
    put, places = SPREAD[spread]
    with pytest.raises(ValueError, match=rf"spread over several devices \({places}\).*Load it onto one.*vLLM"):
        AtlasRolloutEngine(model=put(policy()), console=False)


@pytest.mark.parametrize("spread", SPREAD)
def test_a_policy_that_is_spread_later_is_refused_at_the_next_call(spread, cuda):
    model = policy()
    engine = engine_of(model)
    generate(engine, max_new_tokens=2)
    SPREAD[spread][0](model)
    with pytest.raises(ValueError, match="spread over several devices"):
        generate(engine, max_new_tokens=2)


@pytest.mark.parametrize("spread", SPREAD)
def test_a_draft_model_over_several_devices_is_refused(spread, cuda):
    model = SPREAD[spread][0](tiny := policy())
    assert model is tiny
    with pytest.raises(ValueError, match="spread over several devices"):
        DraftLM(model, VOCAB)


def test_one_device_by_any_name_is_one_device(cuda):
    model = policy()
    model.hf_device_map = {"": torch.device("cpu")}
    assert tokens_of(generate(engine_of(model), max_new_tokens=2)) == tokens_of(
        generate(engine_of(policy()), max_new_tokens=2)
    )
