"""Sessions over one cache, as a draft LM enters them: its steps are captured once, and no change of a module is missed."""

from __future__ import annotations

import gc
import weakref
from types import MethodType

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from atlas_rl.policy import autocast, in_process
from atlas_rl.policy.base import Segments
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.parts import kept
from atlas_rl.policy.step_graphs import StepGraphs
from atlas_rl.policy.threads import stand_ins
from atlas_rl.speculators.draft_lm import DraftLM
from tests.casts import Casts
from tests.engines import VOCAB, draft_model, fixed, generate, reference
from tests.models import FACTORIES, tiny_llama

STEPS, CHANGED = 7, 4  # steps, each in a session; the one before which something changes


class Graph:
    """Stands for a CUDA graph: replaying it does the work again."""

    def __init__(self, work):
        self.work, self.replays = work, 0

    def replay(self):
        self.replays += 1
        self.work()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs of every `StepGraphs`, in the order of their captures; steps are captured on a CPU."""
    made = {}

    class Captured(StepGraphs):
        def __init__(self, forward, **_options):
            super().__init__(forward, capture=True)
            made[self] = []

        def _graph_of(self, work):
            graph = Graph(work)
            made[self].append(graph)
            graph.replay()
            return graph

    monkeypatch.setattr(in_process, "StepGraphs", Captured)
    return made


def with_noted_caches(runner, noted):
    """Let a runner's caches have fixed shapes, and note them."""
    own = runner.new_cache

    def new_cache(*args):
        cache = own(*args)
        cache.varlen = True
        noted.append(cache)
        return cache

    runner.new_cache = new_cache


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_draft_lm_is_captured_once_per_size_and_call(k, graphs):
    drafter, caches = DraftLM(draft_model(), VOCAB), []
    engine = fixed(drafter, k)
    with_noted_caches(drafter._runner, caches)
    for _ in range(2):
        caches.clear()
        graphs.clear()
        assert generate(engine).completion_ids == reference().completion_ids
        (cache,) = [cache for cache in caches if cache.steps is not None]
        own = graphs[cache.steps]
        sizes = {size for size, *_ in cache.steps._steps}
        growths = cache.generation  # after each, every size is captured anew
        assert 0 < len(own) <= len(sizes) * growths
        assert sum(graph.replays for graph in own) > 2 * len(own)
        engine.policy_updated()


def logits_over(runner, tokens, starts, cache):
    lengths = np.full(2, len(tokens) // 2)
    with runner.session(cache):
        return runner.forward(
            Segments(tokens, 0, np.full(2, starts), lengths), np.arange(len(tokens)) if starts else lengths.cumsum() - 1
        ).clone()


def logits_of(model, change, *, plain=False):
    """Logits of a step per session, with a change made to the model before one of them; and the cache.

    With `plain`, modules run their own code, and nothing has a fixed shape.
    """
    runner, rng, out = InProcessRunner(model), np.random.default_rng(3), []
    runner.row_bytes(1)  # probes
    if plain:
        runner._fuses = False
    else:
        with_noted_caches(runner, [])
    cache = runner.new_cache(2, 64)
    with runner.session(cache):
        runner.reserve(2, 64)
    for step in range(STEPS):
        if step == CHANGED:
            change(model)
        tokens = rng.integers(64, size=2 if step else 6)
        out.append(logits_over(runner, tokens, step + 2 if step else 0, cache))
    return out, cache


def nothing(_model):
    pass


def patched(model):
    layer = model.model.layers[1].mlp
    own = layer.forward
    layer.forward = MethodType(lambda _, x: 2 * own(x), layer)


def doubled(_module, _args, out):
    return 2 * out


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(doubled)


def hooked_early(model):
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],))


def hooked_norm(model):
    model.model.layers[0].input_layernorm.register_forward_hook(doubled)


class Doubling(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def wrapped(model):
    model.model.layers[0].mlp.down_proj = Doubling(model.model.layers[0].mlp.down_proj)


def another_layer(model):
    model.model.layers[1] = tiny_llama(seed=9).model.layers[1]


def another_class(model):
    norm = model.model.norm

    class Twice(type(norm)):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    norm.__class__ = Twice


def another_weight(model):
    norm = model.model.layers[0].post_attention_layernorm
    norm.weight = nn.Parameter(3 * norm.weight.detach())


def another_address(model):
    projection = model.model.layers[1].self_attn.q_proj
    projection.weight.data = 3 * projection.weight.data


def written_in_place(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)


CHANGES = [
    patched,
    hooked,
    hooked_early,
    hooked_norm,
    wrapped,
    another_layer,
    another_class,
    another_weight,
    another_address,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_sessions_is_seen(change, graphs):
    """By replacements, which run no stale code, and by graphs: none of before is replayed."""
    before = []

    def noting(model):
        change(model)
        before.extend((graph, graph.replays) for made in graphs.values() for graph in made)

    out, cache = logits_of(tiny_llama(seed=3), noting)
    assert len(before) == 1
    assert all(graph.replays == count for graph, count in before)
    assert len(graphs[cache.steps]) == 2
    expected, unchanged = (logits_of(tiny_llama(seed=3), each, plain=True)[0] for each in (change, nothing))
    assert max((a - b).abs().max() for a, b in zip(out, expected, strict=True)) < 1e-4
    assert (expected[CHANGED] - unchanged[CHANGED]).abs().max() > 1e-3


def adapted():
    model = tiny_llama(seed=3)
    torch.manual_seed(0)  # of the adapters
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return model


@pytest.mark.parametrize(
    ("change", "captures"), [("merge_adapter", 2), ("disable_adapter_layers", 2), ("enable_adapter_layers", 1)]
)
def test_what_happens_to_adapters_between_sessions_is_seen(change, captures, graphs):
    def changed(model):
        getattr(model.base_model, change)()

    out, cache = logits_of(adapted(), changed)
    assert len(graphs[cache.steps]) == captures
    expected, _ = logits_of(adapted(), changed, plain=True)
    assert max((a - b).abs().max() for a, b in zip(out, expected, strict=True)) < 1e-3


def under_autocast(model):
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def biased(model):
    """Other values at the same address, in the bias of a layer that has a copy."""
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.add_(3)


def qwen2():
    model = FACTORIES["qwen2"](seed=3)
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    return model


def reserved_under_autocast():
    """A runner of a policy under autocast, and a cache with room for two rows."""
    runner = InProcessRunner(under_autocast(tiny_llama(seed=3)))
    runner.row_bytes(1)
    with_noted_caches(runner, [])
    cache = runner.new_cache(2, 64)
    with runner.session(cache):
        runner.reserve(2, 64)
    return runner, cache


def test_weights_are_converted_once_per_cache(graphs):
    (runner, cache), converted = reserved_under_autocast(), []
    for step in range(STEPS):
        with Casts(runner.model) as casts:
            logits_over(runner, np.arange(2 if step else 6), step + 2 if step else 0, cache)
        converted.append(casts.weights)
    assert converted == [0] * STEPS  # in the first session above
    assert len(graphs[cache.steps]) == 1


def test_converted_weights_go_with_the_cache():
    """At once, not when Python looks for circles."""
    runner = InProcessRunner(under_autocast(tiny_llama(seed=3)))
    runner.row_bytes(1)
    cache = runner.new_cache(2, 64)
    cache.varlen = True
    for step in range(3):
        logits_over(runner, np.arange(2 if step else 6), step + 2 if step else 0, cache)
    assert cache.steps._steps
    assert runner.halves.num_bytes > 0
    gc.disable()
    try:
        del cache
        assert runner.halves.num_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("change", [nothing, written_in_place, biased, another_weight, another_address, patched])
def test_no_copy_of_a_weight_is_stale(change, graphs, monkeypatch):
    """Under autocast, where steps multiply by copies of half the size: as if every session made its own."""
    make = qwen2 if change is biased else lambda: tiny_llama(seed=3)
    out, cache = logits_of(under_autocast(make()), change)
    assert len(graphs[cache.steps]) == (1 if change is nothing else 2)
    monkeypatch.setattr(autocast._Copies, "are_of", lambda copies, dtype: False)
    expected, unchanged = (logits_of(under_autocast(make()), each)[0] for each in (change, nothing))
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert (expected[CHANGED] - unchanged[CHANGED]).abs().max() > 0.1 or change is nothing


@pytest.mark.parametrize("change", [written_in_place, another_address])
def test_converted_weights_are_freed_when_others_take_their_place(change, graphs):
    """Captured steps hold the layers' replacements, which multiply by them."""
    (runner, cache), seen = reserved_under_autocast(), []
    for step in range(STEPS):
        if step == CHANGED:
            copies = kept(cache.parts, autocast._Kept).copies
            seen = [weakref.ref(half.weight) for half in copies._halves.values()]
            num_bytes, copies = runner.halves.num_bytes, None
            change(runner.model)
        logits_over(runner, np.arange(2 if step else 6), step + 2 if step else 0, cache)
    assert seen
    assert [each() for each in seen if each() is not None] == []
    assert runner.halves.num_bytes == runner.halves.most_bytes == num_bytes
    assert len(cache.steps._variants) == 1
    assert len(graphs[cache.steps]) == 2


def test_values_written_in_place_need_no_new_graph(graphs):
    out, cache = logits_of(tiny_llama(seed=3), written_in_place)
    assert len(graphs[cache.steps]) == 1
    unchanged, _ = logits_of(tiny_llama(seed=3), nothing)
    assert (out[CHANGED] - unchanged[CHANGED]).abs().max() > 1e-3


def test_a_global_hook_between_sessions_is_seen(graphs):
    handles = []
    try:
        _, cache = logits_of(
            tiny_llama(seed=3),
            lambda _: handles.append(register_module_forward_hook(lambda *_: None)),
        )
    finally:
        handles[0].remove()
    assert len(graphs[cache.steps]) == 2


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_replacements_are_the_same_in_every_session(name):
    runner = InProcessRunner(FACTORIES[name](seed=3))
    cache, seen = runner.new_cache(2, 64), []
    for step in range(4):
        logits_over(runner, np.arange(6 if step == 0 else 2), step + 2 if step else 0, cache)
        with runner.session(cache):
            seen.append((cache.parts, *stand_ins()))
    assert all(each == seen[1] for each in seen[2:])
    assert len(set(map(len, seen))) == 1
