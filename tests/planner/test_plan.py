"""The planner's advice: it does not contradict its figures, can be followed, and ends."""

from __future__ import annotations

import re

import pytest

from atlas_rl.planner.configs import CONFIGS
from atlas_rl.planner.drafters import drafter_model
from atlas_rl.planner.hardware import MAX_GPUS, Machine, gpu_named
from atlas_rl.planner.host import NO_HOST, host_of
from atlas_rl.planner.model import parse_model
from atlas_rl.planner.plan import make_plan, render
from atlas_rl.planner.speculation import best_draft_tokens, crossover_batch, paying_batches
from tests.planner.configs import MIXTRAL, QWEN3_30B_A3B
from tests.planner.settings import setting


def verdict(base, **options):
    return render(make_plan(base, **options), base).splitlines()[-1]


@pytest.mark.parametrize("config", [QWEN3_30B_A3B, QWEN3_30B_A3B | {"intermediate_size": None}, MIXTRAL])
def test_a_head_has_an_mlp_although_no_layer_of_its_policy_is_dense(config):
    model = parse_model(config)
    assert model.num_dense_layers == 0
    width = config["intermediate_size"] or 4 * model.hidden_size
    assert drafter_model("eagle3", model).mlp_params == 3 * model.hidden_size * width


@pytest.mark.parametrize("host", [host_of("typical"), NO_HOST])
@pytest.mark.parametrize("accept", [0.4, 0.6, 0.8])
def test_ranges_that_pay_are_those_of_every_single_batch(host, accept):
    base = setting(QWEN3_30B_A3B, host=host)
    inside = {batch for first, last in paying_batches(base, accept, 4, 150) for batch in range(first, last + 1)}
    every = {batch for batch in range(1, 151) if best_draft_tokens(base, batch, accept, 4)}
    assert inside == every
    losing = set(range(1, 151)) - every
    assert crossover_batch(base, accept, 4, 150) == (min(losing) if losing else None)


def test_the_verdict_names_the_batches_at_which_experts_pay():
    base = setting(QWEN3_30B_A3B, host=host_of("typical"))
    ((first, last),) = make_plan(base, batch=64, accept=0.4).paying_batches
    assert 1 < first < 64 < last
    gains = r"\d+ tokens/s without speculation, \d+ with \d+ drafts \(1\.\d+x\)\."
    assert re.fullmatch(rf"{gains} It pays only from batch {first} to {last}\.", verdict(base, batch=64, accept=0.4))
    assert "no draft length pays at batch 1. It pays only from" in verdict(base, batch=1, accept=0.4)
    assert "It pays only at batch 1, from batch" in verdict(setting(QWEN3_30B_A3B), batch=1, accept=0.4)
    dense = setting(CONFIGS["Llama-3.1-8B"], context=64)
    assert verdict(dense, batch=1, accept=0.4).endswith("on it does not pay.")
    assert "It pays at no batch up to" in verdict(dense, batch=1, accept=0.0)


@pytest.mark.parametrize(
    ("num_gpus", "batch", "context", "said"),
    [
        (1, 1, 1024, "take 11 GPUs, a narrower"),
        (8, 128, 32768, "more GPUs alone do not help, since each keeps the same cache: take 11 GPUs and a --batch of"),
        (32, 128, 32768, "more GPUs do not help, since each keeps the same cache: take a --batch of at most"),
        (32, 1, 10**8, "no number of GPUs holds a single request: take a narrower --precision or a shorter --context"),
    ],
)
def test_advice_on_memory_can_be_followed(num_gpus, batch, context, said):
    """A latent cache is not split."""
    base = setting(CONFIGS["DeepSeek-V3"], "h200", num_gpus, context=context)
    with pytest.raises(ValueError, match=r"does not fit") as raised:
        make_plan(base, batch=batch, accept=0.7)
    text = str(raised.value)
    assert said in text
    gpus, most = re.search(r"take (\d+) GPUs", text), re.search(r"(?:and|take) a --batch of at most (\d+)", text)
    followed = setting(CONFIGS["DeepSeek-V3"], "h200", int(gpus[1]) if gpus else num_gpus, context=context)
    if most:
        assert followed.memory(int(most[1])).fits
        assert not followed.memory(int(most[1]) + 1).fits
    elif gpus:
        assert followed.memory(batch).fits


def test_advice_says_how_many_gpus_share_a_cache():
    with pytest.raises(ValueError, match="more GPUs do not help, since at most 8 of them share a cache"):
        make_plan(setting(CONFIGS["Llama-3.1-8B"], "h100", context=2048), batch=100_000, accept=0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 10**400}, "--batch must be at most 1,000,000"),
        ({"batch": 1, "max_draft_tokens": 100_000}, "--max-draft-tokens must be at most 256"),
    ],
    ids=["batch", "drafts"],
)
def test_counts_beyond_all_use_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(setting(CONFIGS["Llama-3.1-8B"]), accept=0.7, **options)


def test_so_are_those_of_context_gpus_and_config():
    with pytest.raises(ValueError, match="--context must be at most 1,000,000,000"):
        make_plan(setting(CONFIGS["Llama-3.1-8B"], context=10**400), batch=1, accept=0.7)
    with pytest.raises(ValueError, match=f"--gpus must be at most {MAX_GPUS:,}"):
        Machine(gpu=gpu_named("h100"), num_gpus=10**400)
    with pytest.raises(ValueError, match="'vocab_size' must be at most 1,000,000,000"):
        parse_model(CONFIGS["Llama-3.1-8B"] | {"vocab_size": 10**400})
