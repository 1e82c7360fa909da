"""The probe: what depends on more than a row's own tokens is refused with its cause; what is right is let through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM

from atlas_rl.audit.plain_forward import plain_logits
from atlas_rl.policy import probe
from atlas_rl.policy.base import Segments
from atlas_rl.policy.in_process import InProcessRunner
from benchmarks.tiny_policies import build
from tests.models import tiny_llama, tiny_mistral, tiny_qwen3
from tests.policy.texts import generate, plain


def as_class(model, forward):
    """The same policy, of a class with another forward."""
    model.__class__ = type("Custom", (type(model),), {"forward": forward})
    return model


# ------------------------------------------------------------------------------------------------ logits of some positions


def swallows(self, input_ids=None, position_ids=None, **kwargs):
    return LlamaForCausalLM.forward(self, input_ids=input_ids, position_ids=position_ids, use_cache=False)


def lacks(self, input_ids=None, attention_mask=None, position_ids=None):
    return LlamaForCausalLM.forward(self, input_ids=input_ids, position_ids=position_ids, use_cache=False)


def renamed(self, input_ids=None, position_ids=None, num_logits_to_keep=0, use_cache=None):
    assert isinstance(num_logits_to_keep, int)
    return LlamaForCausalLM.forward(
        self, input_ids=input_ids, position_ids=position_ids, logits_to_keep=num_logits_to_keep, use_cache=False
    )


def counts_only(self, input_ids=None, position_ids=None, logits_to_keep=0, use_cache=None):
    output = LlamaForCausalLM.forward(self, input_ids=input_ids, position_ids=position_ids, use_cache=False)
    output.logits = output.logits[:, -int(logits_to_keep) :] if logits_to_keep is not None else output.logits
    return output


def gives_a_tuple(self, input_ids=None, position_ids=None, logits_to_keep=0, **kwargs):
    output = LlamaForCausalLM.forward(
        self, input_ids=input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, use_cache=False
    )
    return (output.logits,)


@pytest.mark.parametrize("forward", [swallows, lacks, renamed, counts_only, gives_a_tuple])
@pytest.mark.parametrize("speculation", [False, True])
def test_a_forward_that_keeps_logits_its_own_way_gives_the_same_tokens(forward, speculation):
    model = as_class(tiny_llama(seed=3), forward)
    assert generate(model, speculation=speculation, audit_share=1) == plain(tiny_llama(seed=3))


@pytest.mark.parametrize("forward", [swallows, lacks, renamed, counts_only, gives_a_tuple])
@pytest.mark.parametrize("places", [[1], [0, 2], [0, 1, 2]])
def test_the_audit_reads_the_same_logits(forward, places):
    tokens, wanted = torch.tensor([5, 9, 2]), torch.tensor(places)
    expected = plain_logits(tiny_llama(seed=3), tokens, wanted).logits
    found = plain_logits(as_class(tiny_llama(seed=3), forward), tokens, wanted).logits
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_forward_that_starts_to_return_other_rows_is_refused_at_that_step():
    model = tiny_llama(seed=3)
    runner = InProcessRunner(model)
    segments = Segments(np.array([5, 9, 2]), 0, np.zeros(1, np.int64), np.array([3]))
    with runner.session(runner.new_cache(1, 8)):
        assert len(runner.forward(segments, np.array([1]))) == 1
        as_class(model, swallows)
        with pytest.raises(
            ValueError, match=r"Custom.forward returned logits of shape .*one row of logits per position"
        ):
            runner.forward(segments, np.array([1]))


def test_a_forward_without_positions_is_refused():
    def forward(self, input_ids=None, attention_mask=None):
        return LlamaForCausalLM.forward(self, input_ids=input_ids)

    with pytest.raises(ValueError, match="takes no position_ids"):
        InProcessRunner(as_class(tiny_llama(), forward))


# ------------------------------------------------------------------------------------------------------- what is compared


class LongestText(nn.Module):
    """A rotary embedding of somebody's own, which turns slower once a text in the batch is long."""

    def __init__(self, inner, switch):
        super().__init__()
        self.inner, self.switch = inner, switch

    def forward(self, x, position_ids, **kwargs):
        slower = position_ids.max() + 1 > self.switch
        return self.inner(x, position_ids / 2 if slower else position_ids, **kwargs)


def test_positions_that_depend_on_the_longest_text_are_found_however_far_the_switch_is():
    model = tiny_llama(context=4096)
    model.model.rotary_emb = LongestText(model.model.rotary_emb, 4000)
    with pytest.raises(ValueError, match=r"with rows at positions 0 and 4,092.*more than a row's own tokens"):
        generate(model)


def test_a_layer_that_reads_its_neighbours_is_found():
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) + x.mean(dim=(0, 1))
    with pytest.raises(ValueError, match="does not give the logits of a plain forward"):
        generate(model)


def test_a_window_that_only_the_attention_function_is_told_of_is_found_at_any_size():
    """The mask shows all; past the window, the ragged attention would hide what a plain forward sees."""
    model = tiny_llama(context=100_000)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"sliding_window": 50_000}), with_kwargs=True
        )
    runner = InProcessRunner(model)
    with pytest.raises(ValueError, match=r"up to 50000 tokens.*mask hides other tokens"):
        runner.check_reach(50_001)
    runner.check_reach(50_000)
    assert generate(model) == plain(tiny_llama(context=100_000))


def test_the_long_row_goes_past_the_window_where_that_is_affordable(monkeypatch):
    lengths = []
    own = probe._Probe._compare
    monkeypatch.setattr(
        probe._Probe,
        "_compare",
        lambda self, logits, *others, **options: (lengths.append(len(logits)), own(self, logits, *others, **options)),
    )
    config = tiny_mistral(context=512).config
    config.sliding_window = 100
    for flops, expected in ((1e11, 100 + 12), (1.0, 12)):
        monkeypatch.setitem(probe._FLOPS, "cpu", flops)
        lengths.clear()
        model = MistralForCausalLM(config).eval()
        InProcessRunner(model).check_reach(4)
        assert lengths[-1] + len(probe._TAIL) == expected  # but for the first tokens of segments


# --------------------------------------------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("factory", [tiny_llama, tiny_mistral, tiny_qwen3])
def test_the_probe_changes_neither_random_state_nor_policy(factory):
    model = factory()
    model.train()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    attributes = [set(vars(module)) for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    InProcessRunner(model).check_reach(4)
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())
    assert [set(vars(module)) for module in model.modules()] == attributes
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


def test_dynamic_frequencies_that_a_long_text_left_behind_stay():
    model = build("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    with torch.no_grad():
        model(input_ids=torch.ones(1, 200, dtype=torch.int64))
    rotary = model.model.rotary_emb
    stretched = rotary.inv_freq.clone()
    InProcessRunner(model).check_reach(4)
    assert torch.equal(rotary.inv_freq, stretched)
    assert rotary.max_seq_len_cached == 200


def test_tokens_that_a_policy_masks_by_itself_do_not_count():
    model = tiny_llama(seed=3)
    model.lm_head.register_forward_hook(
        lambda module, args, output: output.masked_fill(torch.arange(64) % 5 == 0, float("-inf"))
    )
    InProcessRunner(model).check_reach(4)


def test_cache_bytes_are_those_of_the_layers():
    model = build("gemma4_text")
    runner = InProcessRunner(model)
    kinds = model.config.layer_types
    dims = [
        8 if kind == "sliding_attention" else model.config.per_layer_config[i].head_dim for i, kind in enumerate(kinds)
    ]
    assert len(set(dims)) == 2
    assert runner.row_bytes(10) == 10 * sum(2 * 2 * dim * 4 for dim in dims)
    with runner.session(cache := runner.new_cache(1, 10)):
        runner.forward(Segments(np.array([1, 2]), 0, np.zeros(1, np.int64), np.array([2])), np.array([1]))
    assert sum(t.nbytes for store in (cache.keys, cache.values) for t in store.values()) == runner.row_bytes(10)


# ------------------------------------------------------------------------------------------------ code of somebody's own


def previous_too(module, args):
    """Half of the state before, in the batch: right but for the first token of each segment."""
    states = args[0].clone()
    states[:, 1:] += args[0][:, :-1] / 2
    return (states,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("where", ["lm_head", "model.layers.1.mlp"])
def test_a_fault_at_first_tokens_alone_is_found_in_every_precision(dtype, where):
    model = tiny_llama(seed=3).to(dtype)
    InProcessRunner(model).check_reach(4)
    model.get_submodule(where).register_forward_pre_hook(previous_too)
    with pytest.raises(ValueError, match=r"logits of a plain forward (at the first tokens of segments, )?with rows"):
        InProcessRunner(model).check_reach(4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe"])
@pytest.mark.parametrize("seed", range(3))
def test_experts_in_low_precision_pass(kind, seed):
    torch.manual_seed(seed)
    InProcessRunner(build(kind).bfloat16()).check_reach(4)


def louder_if(told):
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        output = LlamaForCausalLM.forward(self, input_ids=input_ids, position_ids=position_ids, **kwargs)
        output.logits = output.logits * 2 if told(input_ids) else output.logits
        return output

    return forward


TOLD = {
    "long": lambda ids: ids.shape[1] > 20,
    "longer": lambda ids: ids.shape[1] > 120,
    "a token": lambda ids: bool((ids == 33).any()),
    "many tokens": lambda ids: ids.unique().numel() > 40,
}


@pytest.mark.parametrize("told", TOLD)
def test_a_forward_of_somebodys_own_is_looked_at_as_far_as_is_affordable(told):
    with pytest.raises(ValueError, match="does not give the logits of a plain forward"):
        InProcessRunner(as_class(tiny_llama(seed=3), louder_if(TOLD[told]))).check_reach(4)
    as_hook = tiny_llama(seed=3)
    as_hook.model.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(as_hook, "told", TOLD[told](kwargs["input_ids"])), with_kwargs=True
    )
    as_hook.lm_head.register_forward_hook(lambda module, args, output: output * 2 if as_hook.told else output)
    with pytest.raises(ValueError, match="does not give the logits of a plain forward"):
        InProcessRunner(as_hook).check_reach(4)


def padded(columns):
    model = tiny_llama(seed=3)
    model.register_forward_hook(
        lambda module, args, output: setattr(
            output, "logits", nn.functional.pad(output.logits, (0, columns), value=-1e30)
        )
    )
    return model


@pytest.mark.parametrize("speculation", [False, True])
def test_logits_of_tokens_that_the_head_does_not_know_are_refused(speculation):
    with pytest.raises(ValueError, match="logits of 68 tokens, and its LM head knows 64"):
        generate(padded(4), speculation=speculation)


def test_tokens_that_the_forward_cuts_off_are_never_sampled():
    prompts = [[5, 62, 9, 5, 62, 9, 5], [63, 7, 63, 7]]
    found = generate(padded(-4), prompts, speculation=True, audit_share=1)
    assert found == plain(padded(-4), prompts)
    assert max(map(max, found)) < 60


@pytest.mark.parametrize("context", [1, 2, 3, 7, 9, 13])
def test_short_contexts_are_looked_at_as_far_as_they_go(context):
    runner = InProcessRunner(tiny_llama(context=context))
    assert runner.max_context == context
    runner.check_reach(1)
