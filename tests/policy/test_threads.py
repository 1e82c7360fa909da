"""Threads that share policies: calls wait for each other, plain forwards do not and are the policy's own."""

from __future__ import annotations

import copy
import io
import threading
from abc import ABC
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from atlas_rl.policy.base import Segments, Taps
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.logit_form import after_head, probe_products
from atlas_rl.policy.threads import GENERATING, evaluation_mode, replaced_forwards
from tests.models import FACTORIES, tiny_gpt2, tiny_llama

TEXT = torch.arange(1, 25)[None]
PADDED = torch.cat([torch.ones(1, 6, dtype=torch.long), torch.ones(1, 18, dtype=torch.long)], 1)
PADDED[0, :6] = 0


def in_a_thread(work):
    """What `work` returns in a thread of its own, or raises there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


def session(model, runner=None):
    runner = runner or InProcessRunner(model)
    return runner.session(runner.new_cache(4, 64))


def plain(model, **options):
    with torch.no_grad():
        return model(TEXT, **options).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_a_plain_forward_of_another_thread_is_the_same_during_a_session(name, implementation):
    model = FACTORIES[name](seed=1)
    model.set_attn_implementation(implementation)
    options = ({}, {"attention_mask": PADDED})
    expected = [plain(model, **each) for each in options]
    with session(model):
        during = [in_a_thread(lambda each=each: plain(model, **each)) for each in options]
    # To the bit: neither the attention nor the linear layers of the session.
    assert all(torch.equal(a, b) for a, b in zip(during, expected, strict=True))


def test_a_plain_forward_of_another_thread_is_the_same_while_the_way_behind_the_head_is_looked_at():
    model = tiny_llama(seed=1)
    expected, during = plain(model), []
    own = LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            during.append(in_a_thread(lambda: plain(model)))
        return own(self, *args, **kwargs)

    model.__class__ = type("Watched", (LlamaForCausalLM,), {"forward": forward})
    products = probe_products(model.config.vocab_size)
    assert torch.equal(after_head(model, products), products)
    assert len(during) == 1
    assert torch.equal(during[0], expected)


def test_a_forward_that_spans_the_begin_of_a_session_is_the_same():
    model = tiny_llama(seed=1)
    expected = plain(model)
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(30)

    handle = model.model.layers[1].register_forward_pre_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(lambda: plain(model))
        assert inside.wait(30)
        with session(model):  # its mask was made before the session, its second layer runs inside
            go_on.set()
            assert torch.equal(result.result(timeout=30), expected)
        inside.clear()
        go_on.clear()
        with session(model):
            result = pool.submit(lambda: plain(model))
            assert inside.wait(30)
        go_on.set()  # and the other way round
        assert torch.equal(result.result(timeout=30), expected)
    handle.remove()


def test_training_goes_on_with_dropout_and_checkpointing_during_a_session():
    model = tiny_gpt2(seed=3).train()
    model.gradient_checkpointing_enable()

    def loss_and_gradient():
        model.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = model(TEXT, labels=TEXT, use_cache=False).loss
            loss.backward()
        return loss.item(), model.transformer.wte.weight.grad.clone()

    loss, gradient = loss_and_gradient()
    with session(model):
        during, gradient_during = in_a_thread(loss_and_gradient)
    assert during == loss
    assert torch.equal(gradient_during, gradient)
    with evaluation_mode(model), torch.no_grad():
        assert model(TEXT, labels=TEXT).loss.item() != pytest.approx(loss, abs=1e-3)  # dropout counts


def test_what_another_thread_sets_meanwhile_stays():
    model = tiny_gpt2(seed=3).train()
    with session(model):
        in_a_thread(model.eval)
        in_a_thread(model.transformer.h[1].train)
    assert [name for name, m in model.named_modules() if m.training] == [
        name for name, _ in model.named_modules() if name.startswith("transformer.h.1")
    ]


def test_a_copy_that_another_thread_makes_is_an_ordinary_model():
    model = tiny_gpt2(seed=3).train()
    expected = plain(model.eval())
    model.train()
    with session(model):
        made = in_a_thread(lambda: copy.deepcopy(model))
    for other in (made, model):
        assert all(type(module) is class_of(module) and module.training for module in other.modules())
        assert type(other.config) is class_of(other.config)
        assert torch.equal(plain(other.eval()), expected)


def test_a_session_in_another_thread_waits_and_nested_ones_do_not():
    policy, drafter = tiny_llama(seed=4), tiny_gpt2(seed=5)
    order = []

    def other():
        with session(policy):
            order.append("other")

    with session(policy):
        thread = threading.Thread(target=other)
        thread.start()
        with session(drafter), session(policy):
            thread.join(0.2)
            order.append("nested")
    thread.join(30)
    assert order == ["nested", "other"]
    assert GENERATING.acquire(blocking=False)
    GENERATING.release()


def test_states_are_caught_of_this_thread_only():
    model = tiny_llama(seed=4)
    runner, taps = InProcessRunner(model), Taps(wants_head_inputs=True, wants_layers=(0, 1))
    segments = Segments(np.arange(5), 0, np.zeros(1, np.int64), np.array([5]))
    with session(model, runner):
        runner.forward(segments, np.arange(5), taps)
    expected = [taps.head_inputs, taps.layers[0], taps.layers[1]]

    def others(*_):
        if threading.current_thread() is threading.main_thread():
            in_a_thread(lambda: plain(model))  # between what the hooks catch and the end of the forward

    handle = model.lm_head.register_forward_pre_hook(others)
    with session(model, runner):
        runner.forward(segments, np.arange(5), taps)
    handle.remove()
    caught = [taps.head_inputs, taps.layers[0], taps.layers[1]]
    assert all(torch.equal(a, b) for a, b in zip(caught, expected, strict=True))


def test_adapters_keep_their_dropout_in_other_threads():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
        model = get_peft_model(tiny_llama(seed=6), config).train()

    def forward():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return plain(model)

    expected = forward()
    with session(model):
        assert torch.equal(in_a_thread(forward), expected)
    with evaluation_mode(model):
        assert (forward() - expected).abs().max() > 1e-2
    assert torch.equal(forward(), expected)


def test_an_exception_gives_every_class_back():
    model = tiny_gpt2(seed=3).train()
    with pytest.raises(KeyboardInterrupt), session(model):
        raise KeyboardInterrupt
    assert all(type(module) is class_of(module) for module in model.modules())
    assert type(model.config) is class_of(model.config)


# ------------------------------------------------------------------------------------------- copies, pickles, registers


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def attributes(model):
    """What modules and configuration have, values of torch left out."""
    return [(type(each), list(each.__dict__), each.__dict__["training"]) for each in model.modules()] + [
        [list(getattr(each, name)) for name in vars(each) if name.endswith("_hooks")] for each in model.modules()
    ]


@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
@pytest.mark.parametrize("same_thread", [False, True])
@pytest.mark.parametrize("factory", [tiny_llama, tiny_gpt2])
def test_a_copy_that_is_made_meanwhile_is_one_of_a_policy_at_rest(factory, same_thread, make):
    model = factory(seed=3).train()
    runner, expected = InProcessRunner(model), plain(model.eval())
    model.train()
    outside, made = attributes(make(model)), []
    segments = Segments(np.arange(5), 0, np.zeros(1, np.int64), np.array([5]))

    def take(*_):
        if threading.current_thread() is threading.main_thread():
            made.append(make(model) if same_thread else in_a_thread(lambda: make(model)))

    with session(model, runner):
        take()
        own = type(model.lm_head).forward

        def taking(*args, **kwargs):
            take()
            return own(*args, **kwargs)

        with replaced_forwards({model.lm_head: taking}):  # in the middle of a forward, with its taps
            runner.forward(segments, np.arange(5), Taps(wants_head_inputs=True, wants_layers=(0, 1)))
    assert len(made) == 2
    for other in made:
        assert attributes(other) == outside
        assert vars(other.config).keys() == vars(model.config).keys()
        assert type(other.config) is type(model.config)
        assert torch.equal(plain(other.eval()), expected)


class Registered(torch.nn.Linear):
    """A base that keeps a register, as many libraries do: no name twice."""

    register: ClassVar[dict] = {}

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if cls.__name__ in Registered.register:
            raise RuntimeError(f"{cls.__name__} is registered already")
        Registered.register[cls.__name__] = cls


class WithKeyword(torch.nn.Linear):
    def __init_subclass__(cls, *, kind, **options):
        super().__init_subclass__(**options)
        cls.kind = kind


class RefusingType(type):
    def __new__(cls, name, bases, names, **options):
        if bases != (torch.nn.Linear,):
            raise TypeError("final")
        return super().__new__(cls, name, bases, names, **options)


class RegisteredLinear(Registered):
    pass


class KeywordLinear(WithKeyword, kind="mine"):
    pass


class FinalLinear(torch.nn.Linear, metaclass=RefusingType):
    pass


class AbstractLinear(torch.nn.Linear, ABC):
    pass


@pytest.mark.parametrize("kind", [RegisteredLinear, KeywordLinear, FinalLinear, AbstractLinear])
def test_classes_that_register_or_refuse_subclasses_are_not_told(kind):
    model = tiny_llama(seed=3).train()
    expected = plain(model)
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = kind
    before = dict(Registered.register)
    with session(model), replaced_forwards({model.model.layers[0].mlp.down_proj: kind.forward}):
        layer = model.model.layers[0].mlp.down_proj
        assert isinstance(layer, kind)
        assert layer.__class__ is kind
        assert not layer.training
        assert type(in_a_thread(lambda: copy.deepcopy(layer))) is kind
    assert Registered.register == before
    assert all(type(layer.mlp.down_proj) is kind for layer in model.model.layers)
    assert torch.equal(plain(model), expected)


def test_a_policy_class_that_registers_its_subclasses():
    model = tiny_llama(seed=3)
    made = []

    class Base(LlamaForCausalLM):
        def __init_subclass__(cls, *, name, **options):
            made.append(name)

    class Own(Base, name="own"):
        pass

    model.__class__ = Own
    model.train()
    with session(model):
        assert type(model) is not Own
    assert type(model) is Own
    assert made == ["own"]
