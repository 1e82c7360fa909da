"""The FP4 self-draft: it follows the policy by itself, leaves policy and cache alone, and says what it cannot copy."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from atlas_kernels.nvfp4 import dequantize, quantize, tensor_scale_for
from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy import in_process
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.fp4_self import copy as fp4_copy
from atlas_rl.speculators.fp4_self.copy import HEADROOM, FourBitCopy
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from tests.models import FACTORIES, tiny_gpt2, tiny_llama, tiny_qwen2

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 4]]
EOS = [17]
COPIED = sorted(set(FACTORIES) - {"gpt2"})


@cache
def policy():
    return tiny_llama(seed=5)


def engine_of(model, speculator=None, k=3, **options):
    speculator = speculator or Fp4SelfSpeculator()
    controller = FixedController([speculator.name], speculator.name, k)
    return AtlasRolloutEngine(model=model, speculators=[speculator], controller=controller, console=False, **options)


def rollout(engine, seed=3, num_generations=4, max_new_tokens=24, **options):
    options = {"eos_token_ids": EOS, **options}
    return engine.generate(
        PROMPTS, num_generations=num_generations, max_new_tokens=max_new_tokens, seed=seed, **options
    )


def plain(model, **options):
    return rollout(AtlasRolloutEngine(model=model, speculation=False, console=False), **options)


def quantized_by_hand(model):
    """A copy of `model` whose linear layers, head included, hold what four bits make of them."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = dequantize(
                quantize(module.weight.data, tensor_scale_for(module.weight.data, HEADROOM))
            )
    return twin


# --------------------------------------------------------------------------------------------------- lossless, and useful


@pytest.mark.parametrize("family", COPIED)
def test_every_family_drafts_and_keeps_its_tokens_and_logprobs(family):
    """Sliding windows, soft caps, biases, tied heads: whatever the policy is made of, the copy is made of too."""
    model = FACTORIES[family]()
    drafted, alone = rollout(engine_of(model)), plain(model)
    assert drafted.completion_ids == alone.completion_ids
    # Keys and values of the copy that stayed in the policy's cache would show here.
    for own, other in zip(drafted.logprobs, alone.logprobs, strict=True):
        assert own == pytest.approx(other, abs=1e-4)
    assert drafted.report.acceptance_by_position[0] > 0.5
    assert drafted.report.accepted_length > 1.7


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_k": 5}, {"repetition_penalty": 1.3}, {"temperature": 0.0}]
)
def test_tokens_do_not_depend_on_it(options):
    drafted = rollout(engine_of(policy()), **options)
    assert drafted.completion_ids == plain(policy(), **options).completion_ids
    assert drafted.report.acceptance_rate > 0.3


@pytest.fixture(scope="module")
def short_policy():
    """A policy whose context ends soon, and what it says until then."""
    model = tiny_llama(seed=5, context=40)
    return model, plain(model, num_generations=3, max_new_tokens=400)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_any_length_waves_and_full_contexts(k, short_policy):
    """More requests than rows, so that rows are filled, freed and moved, and requests that end where the context does."""
    model, alone = short_policy
    drafted = rollout(engine_of(model, k=k, max_batch_size=3), num_generations=3, max_new_tokens=400)
    assert drafted.completion_ids == alone.completion_ids
    lengths = [len(prompt) + len(row) for prompt, row in zip(drafted.prompt_ids, drafted.completion_ids, strict=True)]
    assert max(lengths) == 41  # the last token of a full context is drawn and never read
    assert min(lengths) < 41


def test_drafting_for_some_requests_only():
    """A controller that skips requests and asks each for another length: cache rows with gaps."""

    class Uneven(FixedController):
        def plan(self, step):
            return {name: wanted * (np.arange(len(wanted)) % 3) // 2 for name, wanted in super().plan(step).items()}

    speculator = Fp4SelfSpeculator()
    controller = Uneven([speculator.name], speculator.name, 4)
    engine = AtlasRolloutEngine(model=policy(), speculators=[speculator], controller=controller, console=False)
    output = rollout(engine)
    assert output.completion_ids == plain(policy()).completion_ids
    assert output.report.drafted["fp4_self"] > 0


def test_the_policys_cache_drafts_better_than_a_cache_of_its_own():
    shared = engine_of(policy())
    own = engine_of(policy(), DraftLM(quantized_by_hand(policy()), 64))
    rates = {
        name: np.mean([rollout(engine, seed=seed, eos_token_ids=[]).report.acceptance_rate for seed in range(4)])
        for name, engine in {"shared": shared, "own": own}.items()
    }
    assert rates["shared"] > rates["own"] + 0.01


def test_a_policy_of_four_bit_weights_accepts_everything():
    """Four bits hold such weights as they are: the copy is the policy, drawn with its noise."""
    model = quantized_by_hand(policy())
    report = rollout(engine_of(model), eos_token_ids=[]).report
    assert report.acceptance_rate == 1.0


def test_the_copy_drafts_wherever_layers_run_as_one_function(monkeypatch):
    """On a CPU: it drafts what it drafts module by module, and the policy's own layers would be accepted more."""

    def counts():
        report = rollout(engine_of(tiny_llama(seed=5)), temperature=1.5).report
        return report.drafted, report.accepted

    found = counts()
    monkeypatch.setattr(in_process, "flat", lambda *_: nullcontext())
    assert found == counts()
    assert 0 < found[1]["fp4_self"] < found[0]["fp4_self"]


def test_sampled_drafts_come_with_their_probabilities_under_rejection():
    engine = engine_of(policy(), verification="rejection")
    report = rollout(engine).report
    assert report.acceptance_rate > 0.4
    one_by_one = engine_of(policy(), verification="rejection", k=1)
    assert rollout(one_by_one, temperature=0.0).completion_ids == plain(policy(), temperature=0.0).completion_ids


# ---------------------------------------------------------------------------------------------------- it follows the policy


def test_it_is_requantized_when_the_policy_moves_and_only_then():
    model, speculator = copy.deepcopy(policy()), Fp4SelfSpeculator()
    engine, made = engine_of(model, speculator), []
    requantize = FourBitCopy.requantize
    speculator._copy.requantize = lambda: made.append(engine.policy_version) or requantize(speculator._copy)
    before = rollout(engine).report.acceptance_rate
    rollout(engine, seed=4)
    assert made == [0]
    model.load_state_dict(tiny_llama(seed=6).state_dict())
    stale = rollout(engine).report.acceptance_rate
    engine.policy_updated()
    engine.policy_updated()  # twice between two calls, and the second without new rollouts
    followed = rollout(engine).report.acceptance_rate
    assert made == [0, 2]
    assert stale < 0.5 * before
    assert followed > 0.7 * before


def test_a_policy_that_outgrows_its_scales_gets_new_ones():
    model = tiny_llama(seed=5)
    copied = FourBitCopy(model)
    copied.requantize()
    first = [weight.tensor_scale for weight in copied._weights]
    with torch.no_grad():
        copied._linears[0].weight.mul_(3.0)
        copied._linears[1].weight.mul_(1.5)
    copied.requantize()
    second = [weight.tensor_scale for weight in copied._weights]
    assert second[0] == pytest.approx(3 * first[0].item())
    assert second[1:] == first[1:]
    assert not any(weight.saturated for weight in copied._weights)


def test_scales_of_weights_that_were_not_finite_do_not_stay():
    model = tiny_llama(seed=5)
    copied, weights = FourBitCopy(model), copy.deepcopy(model.state_dict())
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        copied.requantize()
        model.load_state_dict(weights)
        copied.requantize()
        assert all(dequantize(weight).isfinite().all() for weight in copied._weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", [False, True])
def test_layers_return_the_type_that_the_policys_return(dtype, autocast, kernels):
    """Qwen2's attention has biases: added in float32 to a product of autocast, they made keys of another type."""
    if kernels:
        pytest.importorskip("triton", reason="the kernels need Triton")
    model = tiny_qwen2(seed=3).to(dtype)
    copied = FourBitCopy(model, quantize_embeddings=True, kernels=kernels)
    twin = quantized_by_hand(model).to(dtype)
    copied.requantize()
    projection, by_hand = model.model.layers[0].self_attn.k_proj, twin.model.layers[0].self_attn.k_proj
    for rows in (1, 8, 70):
        x = torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(rows)).to(dtype)
        tokens = torch.arange(rows)[None] % 64
        with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
            embedded, expected = model.get_input_embeddings()(tokens), by_hand(input=x)
            with copied.running():
                ours = projection(input=x)
                assert model.get_input_embeddings()(input=tokens).dtype == embedded.dtype
        assert ours.dtype == expected.dtype
        # The kernel rounds no weight; autocast and a bfloat16 twin do.
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[ours.dtype]
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_another_policy_is_copied_anew():
    speculator = Fp4SelfSpeculator()
    engine_of(policy(), speculator)
    other = tiny_llama(hidden=48, seed=2)
    assert rollout(engine_of(other, speculator)).completion_ids == plain(other).completion_ids


def test_the_policy_is_left_as_it_was():
    model = tiny_qwen2(seed=3).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    rollout(engine_of(model))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(module.training for module in model.modules())


def test_a_forward_that_fails_puts_the_policy_back():
    copied = FourBitCopy(policy())
    copied.requantize()
    own = policy().get_output_embeddings()

    def failing():
        with copied.running():
            assert own.forward.__func__ is not type(own).forward
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert type(own) is torch.nn.Linear


def test_adapters_stay_as_they_are():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(seed=5), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    copied = FourBitCopy(model.get_base_model())
    assert len(copied._linears) == 2 * 7 + 1
    output = rollout(engine_of(model))
    assert output.completion_ids == plain(model).completion_ids
    assert output.report.acceptance_by_position[0] > 0.5


# ------------------------------------------------------------------------------------------------------------- the copy


def test_head_and_embeddings_are_copied_on_demand():
    heads = {}
    for head in (True, False):
        copied = FourBitCopy(policy(), quantize_head=head)
        copied.requantize()
        heads[head] = copied.num_bytes
    assert heads[True] - heads[False] == 64 * 32 * 9 // 16 + 4
    speculator = Fp4SelfSpeculator(quantize_head=False, quantize_embeddings=True)
    output = rollout(engine_of(policy(), speculator))
    assert output.completion_ids == plain(policy()).completion_ids
    assert output.report.acceptance_rate > 0.3


@pytest.mark.parametrize("autocast", [False, True])
def test_kernels_and_dequantized_weights_are_one_function(autocast):
    pytest.importorskip("triton", reason="the kernels need Triton")
    model, logits = tiny_qwen2(seed=3), {}  # with biases
    for kernels in (False, True):
        copied = FourBitCopy(model, kernels=kernels)
        copied.requantize()
        with torch.no_grad(), copied.running(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits[kernels] = model(torch.tensor([[3, 1, 2]])).logits
    assert logits[True].dtype == logits[False].dtype
    tolerance = 0.1 if autocast else 1e-4  # activations of eight bits, rounded in another order
    torch.testing.assert_close(logits[True], logits[False], rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- switching it on


def test_by_name(caplog):
    with caplog.at_level(logging.WARNING):
        engine = AtlasRolloutEngine(model=policy(), draft_model="fp4", console=False)
    assert "on a CPU" in caplog.text
    assert list(engine.state_dict()) == ["history", "recurrent", "fp4_self"]
    assert rollout(engine).completion_ids == plain(policy()).completion_ids


def test_a_name_that_is_nearly_right_says_so():
    with pytest.raises(ValueError, match="draft_model='fp4'"):
        AtlasRolloutEngine(model=policy(), draft_model="fp-4", console=False)


def test_policies_that_cannot_be_copied_are_named():
    with pytest.raises(ValueError, match=r"attn.c_attn.weight.*Conv1D"):
        AtlasRolloutEngine(model=tiny_gpt2(), draft_model="fp4", console=False)

    class Packed(nn.Linear):
        """As quantization libraries have them."""

    model = tiny_llama(seed=5)
    model.model.layers[1].mlp.up_proj = Packed(32, 64, bias=False)
    with pytest.raises(ValueError, match=r"mlp.up_proj.weight.*Packed"):
        AtlasRolloutEngine(model=model, draft_model="fp4", console=False)


def test_modules_are_changed_once_for_all_tokens_of_a_draft(monkeypatch):
    running, forwards = FourBitCopy.running, []
    monkeypatch.setattr(FourBitCopy, "running", lambda copied: forwards.append(1) or running(copied))
    output = rollout(engine_of(policy(), k=4))
    assert len(forwards) <= output.report.num_forwards
    assert output.report.drafted["fp4_self"] > 3 * len(forwards)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_a_copy_gone_nan_leaves_nothing_in_the_policys_cache(monkeypatch, layers):
    """Cells behind a short text are masked for it, and would still enter as 0 * NaN."""
    dense, made = fp4_copy._dense, []

    def broken(weight, dtype):
        made.append(1)
        forward = dense(weight, dtype)
        if layers == "last" and len(made) <= 7:  # the first layer's
            return forward
        return lambda module, input: forward(module, input) * torch.nan

    monkeypatch.setattr(fp4_copy, "_dense", broken)
    drafted = rollout(engine_of(policy()))
    assert drafted.report.drafter_faults == {"fp4_self": 1}
    assert drafted.completion_ids == plain(policy()).completion_ids
