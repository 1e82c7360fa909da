"""Wrappers of the policy: handed through where they only delegate, refused where a rollout would lose what they do."""

from __future__ import annotations

import functools
import types
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from atlas_rl import AtlasRolloutEngine
from atlas_rl.policy.unwrap import unwrap_policy
from tests.models import tiny_llama

IDS = torch.tensor([[3, 5, 7, 2, 9, 11, 4]])
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
PROMPT_OPTIONS = {"num_virtual_tokens": 3}
# What a method needs beside its defaults to be built on two layers of 32.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": None},
    "C3A": {"block_size": 16},
    "CARTRIDGE": PROMPT_OPTIONS,
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": None},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {**PROMPT_OPTIONS, "num_tasks": 2},
    "P_TUNING": PROMPT_OPTIONS,
    "PREFIX_TUNING": PROMPT_OPTIONS,
    "PROMPT_TUNING": PROMPT_OPTIONS,
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 4, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 20},
}
OUTSIDE_OF_LAYERS = {
    "CARTRIDGE",
    "CPT",
    "LILY",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "SHADOW",
    "XLORA",
}


def adapted(method: str) -> Any:
    """A tiny policy with one PEFT method on it, whose parameters are moved, so that it does something."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    options = {"task_type": "CAUSAL_LM", **OPTIONS.get(method, {})}
    if "target_modules" in config_class.__dataclass_fields__:
        options.setdefault("target_modules", ["q_proj", "v_proj"])
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(seed=5).requires_grad_(True), config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("method", sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"XLORA"}))
@torch.no_grad()
def test_every_peft_method_is_the_same_inside_or_refused(method: str) -> None:
    try:
        model = adapted(method)
    except ImportError as error:
        pytest.skip(str(error))
    if method in OUTSIDE_OF_LAYERS:
        with pytest.raises(ValueError, match=method):
            unwrap_policy(model)
        return
    inside = unwrap_policy(model)
    assert inside is model.base_model.model
    whole = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(inside(input_ids=IDS, use_cache=False).logits, whole)
    assert torch.allclose(inside(input_ids=IDS[:, :4], use_cache=False).logits, whole[:, :4], atol=1e-5), "is causal"


def test_mixtures_of_adapters_by_a_classifier_are_refused(tmp_path: Any) -> None:
    get_peft_model(tiny_llama(seed=5), LORA).save_pretrained(tmp_path / "expert")
    base = tiny_llama(seed=5)
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters={name: str(tmp_path / "expert") for name in "01"}
    )
    with pytest.raises(ValueError, match="XLORA"):
        unwrap_policy(get_peft_model(base, config))


def test_activated_lora_is_refused_where_it_is_active() -> None:
    model = get_peft_model(tiny_llama(seed=5), LORA)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7, 2])
    model.add_adapter("activated", config)
    unwrap_policy(model)
    model.set_adapter("activated")
    with pytest.raises(ValueError, match="activated LoRA"):
        AtlasRolloutEngine(model=model, console=False)


class Own(peft.PeftModelForCausalLM):
    """A wrapper that does something of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def mixed_batch(model: Any) -> None:
    model.forward = functools.partial(model.forward, adapter_names=["default"])


def decorated(model: Any) -> None:
    forward = model.forward

    @functools.wraps(forward)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = doubled


def rebound(model: Any) -> None:
    model.forward = types.MethodType(Own.forward, model)


CHANGES = {
    "partial": (mixed_batch, "computes in a forward of its own"),
    "decorated": (decorated, "computes in a forward of its own"),
    "rebound": (rebound, "computes in a forward of its own"),
    "hook": (lambda model: model.register_forward_hook(lambda *_: None), "forward hook"),
    "pre-hook": (lambda model: model.register_forward_pre_hook(lambda *_: None), "forward hook"),
    "tuner's hook": (lambda model: model.base_model.register_forward_hook(lambda *_: None), "forward hook"),
    "subclass": (lambda model: setattr(model, "__class__", Own), "computes in a forward of its own"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrapper_that_was_changed_is_refused(change: str) -> None:
    model = get_peft_model(tiny_llama(seed=5), LORA)
    apply, message = CHANGES[change]
    apply(model)
    with pytest.raises(ValueError, match=message):
        AtlasRolloutEngine(model=model, console=False)


def test_a_hook_that_comes_later_is_refused_at_the_next_rollout() -> None:
    model = get_peft_model(tiny_llama(seed=5), LORA)
    engine = AtlasRolloutEngine(model=model, console=False)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="forward hook"):
        engine.generate([[2, 3]], max_new_tokens=2, eos_token_ids=())


def test_hooks_inside_the_policy_stay_in_force() -> None:
    """The causal LM itself is run by its own call, so its hooks and replaced forwards are kept."""
    model = get_peft_model(tiny_llama(seed=5), LORA)
    seen = []
    model.get_base_model().register_forward_hook(lambda *_: seen.append(1))
    AtlasRolloutEngine(model=model, console=False, speculation=False).generate(
        [[2, 3]], max_new_tokens=2, eos_token_ids=()
    )
    assert seen


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel], ids=["alone", "data parallel"])
def test_mixed_precision_of_accelerate_is_no_behaviour(wrap: Any) -> None:
    model = get_peft_model(tiny_llama(seed=5), LORA)
    inside = model.base_model.model
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert "forward" in vars(model)
    assert unwrap_policy(wrap(model)) is inside


def test_several_adapters_and_nested_wrappers_are_unwrapped() -> None:
    model = get_peft_model(tiny_llama(seed=5), LORA)
    model.add_adapter("second", LORA)
    model.base_model.set_adapter(["default", "second"])
    assert unwrap_policy(model) is model.base_model.model
    mixed = get_peft_model(tiny_llama(seed=5), LORA, mixed=True)
    assert unwrap_policy(mixed) is mixed.base_model.model
