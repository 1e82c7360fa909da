"""The in-process runner: a ragged cache gives the logits of plain forwards, and the policy is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from atlas_rl import AtlasRolloutEngine
from atlas_rl.policy import ragged_attention as attention
from atlas_rl.policy.base import Segments, Taps
from atlas_rl.policy.in_process import InProcessRunner
from tests.models import FACTORIES, SLIDING_WINDOW, tiny_gemma2, tiny_gpt2, tiny_llama

TOLERANCE = 1e-4  # float32, logits that spread by two nats
VOCAB, LENGTH = 64, 3 * SLIDING_WINDOW


def texts(rows, length=LENGTH, seed=0):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)).numpy()


def plain_logits(model, tokens):
    """Logits of every position of one sequence, from the model as its owner runs it."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens)[None]).logits[0].float()


def pack(rows, first_row, starts):
    lengths = np.array([len(row) for row in rows])
    return Segments(np.concatenate(rows).astype(np.int64), first_row, np.array(starts), lengths)


def forward(runner, rows, starts, first_row=0):
    """Logits of every token, row by row."""
    segments = pack(rows, first_row, starts)
    logits = runner.forward(segments, np.arange(len(segments.token_ids)))
    return logits.split(segments.lengths.tolist())


def assert_ragged_equals_plain(model):
    """Prefill, then segments of different lengths per row, whose rejected tails are overwritten by the next ones."""
    tokens, rng = texts(3), np.random.default_rng(1)
    expected = [plain_logits(model, row) for row in tokens]
    runner = InProcessRunner(model)
    worst, passed = 0.0, np.array([5, 9, 2])
    with runner.session(runner.new_cache(3, LENGTH + 4)):
        logits = forward(runner, [row[:n] for row, n in zip(tokens, passed, strict=True)], [0, 0, 0])
        for row in range(3):
            worst = max(worst, (logits[row] - expected[row][: passed[row]]).abs().max().item())
        while (passed < LENGTH).any():
            accepted = np.minimum(rng.integers(1, 6, size=3), LENGTH - passed)
            accepted = np.maximum(accepted, np.where(passed < LENGTH, 1, 0))
            going = np.flatnonzero(accepted)
            rejected = rng.integers(VOCAB, size=(3, 3))
            news = []
            for row in range(3):
                true = tokens[row, passed[row] : passed[row] + accepted[row]]
                # A row that is through keeps running on junk: its neighbours must not see it.
                num_rejected = rng.integers(4) if len(true) else 1
                news.append(np.append(true, rejected[row, :num_rejected]))
            logits = forward(runner, news, passed)
            for row in going:
                want = expected[row][passed[row] : passed[row] + accepted[row]]
                worst = max(worst, (logits[row][: accepted[row]] - want).abs().max().item())
            passed += accepted
    assert worst < TOLERANCE
    assert runner.vocab_size == VOCAB


def state_of(model):
    """Everything about a model that a session may not change."""
    config = model.config
    return {
        "training": [module.training for module in model.modules()],
        "attention": config._attn_implementation,
        "config": config.to_dict(),
        "generation_config": model.generation_config.to_dict() if hasattr(model, "generation_config") else None,
        "patched": [name for name, module in model.named_modules() if "forward" in module.__dict__],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": torch.is_grad_enabled(),
        "current": attention._this_thread.batch,
    }


# ---------------------------------------------------------------------------------------------------------- logits


def test_ragged_logits_are_plain_logits(tiny_model):
    assert_ragged_equals_plain(tiny_model)


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_ragged_logits_are_plain_logits_with_eager_attention(name):
    model = FACTORIES[name](seed=1)
    model.set_attn_implementation("eager")
    assert_ragged_equals_plain(model)


@pytest.mark.parametrize("wanted", [(0, 1, 2), (2,), (1,)])
def test_layers_are_tapped_before_each_and_behind_the_last(wanted):
    model, tokens = FACTORIES["qwen2"](seed=1), texts(1)[0]
    runner, taps = InProcessRunner(model), Taps(wants_layers=wanted)
    with runner.session(runner.new_cache(1, LENGTH)):
        zero, length = np.zeros(1, np.int64), np.array([LENGTH])
        runner.forward(Segments(tokens, 0, zero, length, zero), np.array([LENGTH - 1]), taps)
    with torch.no_grad():
        *inputs, last = model(torch.from_numpy(tokens)[None], output_hidden_states=True).hidden_states
        assert set(taps.layers) == set(wanted)
        for layer, states in taps.layers.items():
            expected = last[0] if layer == len(inputs) else inputs[layer][0]
            assert torch.allclose(model.model.norm(states) if layer == len(inputs) else states, expected, atol=1e-4)


def test_soft_capped_attention_counts():
    """Gemma 2's cap of 50 is never reached by a tiny model: set it where it bites."""
    model = tiny_gemma2(seed=2)
    model.set_attn_implementation("eager")  # before 5.20 transformers takes SDPA for it, which leaves the cap out
    uncapped = plain_logits(model, texts(1)[0])
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    assert (plain_logits(model, texts(1)[0]) - uncapped).abs().max() > 0.1
    assert_ragged_equals_plain(model)


def test_a_sliding_window_hides_what_lies_behind_it():
    """What the other tests rely on: beyond the window, an early token must not count, and within it, it must."""
    model = FACTORIES["mistral"](layers=1)
    tokens = texts(1)[0]
    changed = tokens.copy()
    changed[0] = (changed[0] + 1) % VOCAB
    runner = InProcessRunner(model)
    with runner.session(runner.new_cache(2, LENGTH)):
        same, other = forward(runner, [tokens, changed], [0, 0])
        difference = (same - other).abs().amax(dim=-1)
    assert (difference[:SLIDING_WINDOW] > 1e-3).all()
    assert (difference[SLIDING_WINDOW:] < 1e-5).all()


def test_copied_rows_go_on_as_the_original(tiny_model):
    tokens = texts(3, seed=3)
    runner, shared = InProcessRunner(tiny_model), 11
    tokens[1:, :shared] = tokens[0, :shared]
    expected = [plain_logits(tiny_model, row) for row in tokens]
    with runner.session(runner.new_cache(4, LENGTH)):
        forward(runner, [tokens[0, :shared]], [0], first_row=2)
        runner.copy_rows(2, [0, 3], shared)
        # Rows 0 and 2 and 3 hold the prefix; row 1 gets junk, and then is made a copy as well.
        forward(runner, [texts(1, seed=4)[0]], [0], first_row=1)
        runner.copy_rows(3, [1], shared)
        logits = forward(runner, [row[shared:] for row in tokens], [shared] * 3, first_row=1)
        for row in range(3):
            assert (logits[row] - expected[row][shared:]).abs().max() < TOLERANCE


def test_rows_may_be_run_apart_and_only_wanted_logits_come_back(llama):
    tokens = texts(3, seed=5)
    expected = [plain_logits(llama, row) for row in tokens]
    runner = InProcessRunner(llama)
    with runner.session(runner.new_cache(3, LENGTH)):
        forward(runner, [tokens[2][:9]], [0], first_row=2)
        forward(runner, [tokens[0][:4], tokens[1][:7]], [0, 0], first_row=0)
        segments = pack([tokens[1][7:10], tokens[2][9:15]], 1, [7, 9])
        logits = runner.forward(segments, np.array([2, 8, 3]))
        assert logits.shape == (3, VOCAB)
        assert logits.dtype == torch.float32
        assert logits.is_contiguous()
        wanted = torch.stack([expected[1][9], expected[2][14], expected[2][9]])
        assert (logits - wanted).abs().max() < TOLERANCE


def test_two_caches_of_one_model_do_not_meet(llama):
    tokens = texts(2, seed=6)
    expected = [plain_logits(llama, row) for row in tokens]
    runner = InProcessRunner(llama)
    first, second = runner.new_cache(1, LENGTH), runner.new_cache(1, LENGTH)
    for cache, row in ((first, 0), (second, 1)):
        with runner.session(cache):
            forward(runner, [tokens[row][:10]], [0])
    for cache, row in ((first, 0), (second, 1)):
        with runner.session(cache):
            (logits,) = forward(runner, [tokens[row][10:]], [10])
        assert (logits - expected[row][10:]).abs().max() < TOLERANCE


# ------------------------------------------------------------------------------------------------- state and sessions


def half_training_model():
    """A GPT-2 with dropout, some of whose modules train and some do not, as after freezing a part by hand."""
    model = tiny_gpt2(seed=3)
    model.train()
    model.transformer.h[0].eval()
    model.transformer.h[1].attn.eval()
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_session_leaves_the_policy_as_it_was(implementation):
    model = half_training_model()
    model.set_attn_implementation(implementation)
    before, weights = state_of(model), [parameter.clone() for parameter in model.parameters()]
    runner = InProcessRunner(model)
    with runner.session(runner.new_cache(1, 8)):
        (logits,) = forward(runner, [[1, 2, 3]], [0])
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
    assert state_of(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    model.eval()
    assert (logits - plain_logits(model, [1, 2, 3])).abs().max() < TOLERANCE  # without dropout


def test_an_exception_inside_leaves_the_policy_as_it_was():
    model = half_training_model()
    before = state_of(model)
    runner = InProcessRunner(model)
    with pytest.raises(IndexError), runner.session(runner.new_cache(1, 2)):
        forward(runner, [[1, 2, 3]], [0])  # beyond the cache
    assert state_of(model) == before
    assert runner._cache is None


def test_the_policy_still_trains_after_a_session():
    model = half_training_model()
    runner = InProcessRunner(model)
    with runner.session(runner.new_cache(1, 8)):
        forward(runner, [[1, 2, 3]], [0])
    tokens = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert sum(parameter.grad is not None for parameter in model.parameters()) > 10


def test_sessions_of_two_models_nest():
    policy, drafter = tiny_llama(seed=4), tiny_gpt2(seed=5)
    tokens = texts(1, seed=7)[0]
    before = state_of(policy), state_of(drafter)
    outer, inner = InProcessRunner(policy), InProcessRunner(drafter)
    cache = inner.new_cache(1, LENGTH)
    with outer.session(outer.new_cache(1, LENGTH)):
        policy_logits, draft_logits = [], []
        for start in range(0, LENGTH, 6):
            policy_logits += forward(outer, [tokens[start : start + 6]], [start])
            with inner.session(cache):
                draft_logits += forward(inner, [tokens[start : start + 6]], [start])
    assert (torch.cat(policy_logits) - plain_logits(policy, tokens)).abs().max() < TOLERANCE
    assert (torch.cat(draft_logits) - plain_logits(drafter, tokens)).abs().max() < TOLERANCE
    assert (state_of(policy), state_of(drafter)) == before


@pytest.mark.parametrize("same_runner", [True, False])
def test_sessions_of_the_same_model_nest(same_runner):
    model = tiny_llama(seed=4)
    tokens, before = texts(2, seed=8), state_of(model)
    outer = InProcessRunner(model)
    inner = outer if same_runner else InProcessRunner(model)
    cache = inner.new_cache(1, LENGTH)
    outer_logits, inner_logits = [], []
    with outer.session(outer.new_cache(1, LENGTH)):
        for start in range(0, LENGTH, 6):
            outer_logits += forward(outer, [tokens[0][start : start + 6]], [start])
            with inner.session(cache):
                inner_logits += forward(inner, [tokens[1][start : start + 6]], [start])
    assert (torch.cat(outer_logits) - plain_logits(model, tokens[0])).abs().max() < TOLERANCE
    assert (torch.cat(inner_logits) - plain_logits(model, tokens[1])).abs().max() < TOLERANCE
    assert state_of(model) == before


def test_the_registered_attention_refuses_to_run_outside_of_a_session():
    model = tiny_llama(seed=4)
    model.config._attn_implementation_internal = attention.NAME
    with pytest.raises(RuntimeError, match="session"):
        plain_logits(model, [1, 2])


def test_parallel_wrappers_are_taken_off():
    model = tiny_llama(seed=4)
    assert InProcessRunner(nn.DataParallel(model)).model is model


# ------------------------------------------------------------------------------------------------------------- PEFT


def lora(**options):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return get_peft_model(tiny_llama(seed=6), config)


def test_an_adapter_counts():
    model = lora(lora_dropout=0.3)
    assert_ragged_equals_plain(model.eval())
    with model.disable_adapter():
        base = plain_logits(model, texts(1)[0])
        assert_ragged_equals_plain(model)
    assert (plain_logits(model, texts(1)[0]) - base).abs().max() > 0.1


def test_an_adapter_is_left_as_it_was():
    model = lora(lora_dropout=0.3).train()
    before = state_of(model)
    expected = plain_logits(model.eval(), texts(1)[0])
    model.train()
    runner = InProcessRunner(model)
    with runner.session(runner.new_cache(1, LENGTH)):
        (logits,) = forward(runner, [texts(1)[0]], [0])
    assert (logits - expected).abs().max() < TOLERANCE
    assert state_of(model) == before


def test_a_trained_copy_of_the_head_counts():
    model = lora(modules_to_save=["lm_head"]).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert_ragged_equals_plain(model)


def test_prompt_learning_is_refused():
    model = get_peft_model(tiny_llama(seed=6), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"prompt-learning.*LoRA"):
        InProcessRunner(model)


# --------------------------------------------------------------------------------------------- what cannot be a policy


def tiny(config_class, model_class, **options):
    return lambda: model_class(config_class(vocab_size=VOCAB, **options)).eval()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
UNFIT = {
    "layers of type 'linear_attention'": tiny(
        MambaConfig, MambaForCausalLM, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "T5ForConditionalGeneration is not a causal LM": tiny(
        T5Config, T5ForConditionalGeneration, d_model=32, d_kv=8, d_ff=64, num_layers=2
    ),
    "BertForMaskedLM is not a causal LM": tiny(BertConfig, BertForMaskedLM, **SIZES),
    "LlamaModel.*AutoModelForCausalLM": lambda: LlamaModel(tiny_llama().config).eval(),
    "Linear.*AutoModelForCausalLM": lambda: nn.Linear(3, 4),
}


@pytest.mark.parametrize("cause", UNFIT)
def test_what_cannot_be_run_is_refused_and_the_cause_is_named(cause):
    torch.manual_seed(0)
    model = UNFIT[cause]()
    before = state_of(model) if hasattr(model, "config") else None
    with pytest.raises(ValueError, match=cause):
        AtlasRolloutEngine(model=model, console=False).generate([[1, 2, 3]], max_new_tokens=4, eos_token_ids=[])
    if before is not None:
        assert state_of(model) == before
