"""The engine: one seed, one text, whatever drafts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.draft_lm import DraftLM
from tests.drafters import Parrot
from tests.engines import ARMS, SETTINGS, VOCAB, draft_model, engine_of, fixed, generate, parrot, policy, reference
from tests.models import FACTORIES, tiny_gpt2


@pytest.mark.parametrize("arm", ARMS)
def test_the_tokens_do_not_depend_on_what_is_drafted(arm):
    engine = ARMS[arm]()
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    if "history" in arm:  # the second time, the history has all of it
        engine.policy_updated()
        output = generate(engine)
        assert output.completion_ids == reference().completion_ids
    assert np.allclose(np.concatenate(output.logprobs), np.concatenate(reference().logprobs), atol=1e-4)
    if "controller" not in arm:
        assert sum(output.report.drafted.values()) > 0


def test_a_perfect_drafter_is_always_accepted_and_shortens_the_run():
    engine = fixed(parrot(0), 8)
    report = generate(engine).report
    assert report.accepted == report.drafted
    assert report.num_forwards < reference().report.num_forwards / 4
    assert report.accepted_length > 4


def test_the_policy_drafting_for_itself_is_always_accepted():
    """Coupled noise: the draft LM draws what the policy will draw."""
    report = generate(fixed(DraftLM(policy(), VOCAB), 4)).report
    assert report.acceptance_rate == 1


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "plain"])
def test_the_tokens_do_not_depend_on_drafts_under_any_sampling(setting):
    wanted = reference(setting).completion_ids
    for engine in (fixed(Parrot(wanted, error_rate=0.3), 5), fixed(DraftLM(draft_model(), VOCAB), 3), engine_of()):
        assert generate(engine, **SETTINGS[setting]).completion_ids == wanted


@pytest.mark.parametrize("name", [name for name in sorted(FACTORIES) if name != "llama"])
def test_the_tokens_do_not_depend_on_drafts_in_any_family(name):
    model = FACTORIES[name](seed=13)
    wanted = generate(engine_of(model, speculation=False)).completion_ids
    drafter = Parrot(wanted, error_rate=0.3)
    engine = engine_of(model, speculators=[drafter], controller=FixedController(["parrot"], "parrot", 5))
    output = generate(engine)
    assert output.completion_ids == wanted
    assert 0 < output.report.acceptance_rate < 1


def test_greedy_tokens_do_not_depend_on_drafts_either():
    wanted = generate(engine_of(speculation=False), temperature=0.0).completion_ids
    for engine in (fixed(Parrot(wanted, error_rate=0.3), 5), fixed(DraftLM(draft_model(), VOCAB), 3), engine_of()):
        assert generate(engine, temperature=0.0).completion_ids == wanted


def test_a_draft_lm_with_a_shorter_context_stops_drafting_where_it_ends():
    short = tiny_gpt2(context=24, seed=14)
    engine = fixed(DraftLM(short, VOCAB), 4)
    prompts = [[1, 2, 3], list(range(30)), [4] * 18]
    wanted = generate(engine_of(speculation=False), prompts).completion_ids
    assert generate(engine, prompts).completion_ids == wanted
    # Alone, a short prompt is drafted for until the draft LM's context is full, and then no more.
    output = generate(engine, [[1, 2, 3]], max_new_tokens=40, num_generations=1, eos_token_ids=[])
    assert (
        output.completion_ids
        == generate(
            engine_of(speculation=False), [[1, 2, 3]], max_new_tokens=40, num_generations=1, eos_token_ids=[]
        ).completion_ids
    )
    assert 0 < output.report.drafted["draft_lm"] <= 21 * 4


def test_a_seed_gives_the_same_tokens_whatever_ran_before():
    engine = engine_of(draft_model=draft_model())
    torch.manual_seed(1)
    generate(engine, [[1, 2]], seed=99, max_new_tokens=5)
    engine.policy_updated()
    torch.manual_seed(2)
    generate(engine, seed=4, temperature=0.5)
    assert generate(engine).completion_ids == reference().completion_ids


def test_another_seed_gives_other_tokens():
    other = generate(engine_of(), seed=4).completion_ids
    assert sum(a == b for a, b in zip(other, reference().completion_ids, strict=True)) <= 1


def test_generations_of_one_prompt_differ():
    rows = generate(engine_of(), [[5, 9, 2]], num_generations=8, max_new_tokens=12).completion_ids
    assert len({tuple(row) for row in rows}) >= 7


def test_without_a_seed_torch_decides():
    engine = engine_of(speculation=False)
    torch.manual_seed(5)
    first, second = generate(engine, seed=None).completion_ids, generate(engine, seed=None).completion_ids
    torch.manual_seed(5)
    assert generate(engine, seed=None).completion_ids == first
    assert first != second


def test_a_seed_leaves_the_global_random_state_alone():
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    generate(engine_of(draft_model=draft_model()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
