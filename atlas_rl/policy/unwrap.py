"""Finds the causal LM inside PEFT and parallel wrappers, and refuses wrappers that do more than delegate.

The engine runs the causal LM itself. That is the policy only if its wrappers pass inputs and outputs through unchanged.
Most PEFT methods replace layers inside the LM, and their wrappers do so. Others act in the wrapper: they change the
inputs, or change the layers by hooks that exist only while the wrapper's own forward runs. A rollout would lose them
unnoticed, so every wrapper is checked for everything that it could do itself:

    its class     forward is PEFT's plain delegation
    the instance  nothing but accelerate's mixed precision has replaced forward
    hooks         only those of FSDP and DeepSpeed are registered on it, and its forward registers none elsewhere
    adapters      none of the active ones is a prompt, or begins at tokens of the input (activated LoRA)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from atlas_rl.policy.compiled import is_compiled

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_PASSES_THROUGH = ("torch.", "accelerate.", "deepspeed.")
"""Modules whose functions change how a forward runs (precision, gathering of weights), not what it computes."""

_MIXES_TOKENS = ("LILY",)
"""Methods whose layers average over all tokens of a batch: what they compute for a token depends on its neighbours."""

_INSTEAD = "use LoRA or another method that lives in the layers, or generate with the trainer's own engine"


def unwrap_policy(model: Any) -> Any:
    """The causal LM inside PEFT and parallel wrappers; adapters stay in place, injected into its layers.

    Raises:
        ValueError: A wrapper does more than call the module inside, which would be lost. The message names it.
    """
    while True:
        inside = _inside(model)
        if inside is None:
            return model
        if not is_compiled(model):  # its forward is that of the compiled module
            _check_forward(model)
        _check_hooks(model)
        model = inside


def without_parallel_wrappers(model: Any) -> Any:
    """The policy as its trainer runs it, with PEFT wrapper and mixed precision but without collectives."""
    while isinstance(model, _PARALLEL) or is_compiled(model):
        model = model._orig_mod if is_compiled(model) else model.module
    return model


def _inside(model: Any) -> Any | None:
    """The module that a wrapper calls; None if the model is not a wrapper."""
    if isinstance(model, _PARALLEL):
        return model.module
    if is_compiled(model):
        return model._orig_mod
    if not hasattr(model, "peft_config"):
        return None  # also spares the import of PEFT
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftModel):
        _check_adapters(model)  # prompts have no tuner inside
        return model.base_model
    if isinstance(model, PeftMixedModel):
        return model.base_model
    if isinstance(model, BaseTuner) or type(model).__name__ == "AdaptionPromptModel":
        return model.model
    return None


def _check_forward(wrapper: nn.Module) -> None:
    """Raise `ValueError` for a wrapper whose forward does anything but delegate."""
    name = _name(wrapper)
    replaced = vars(wrapper).get("forward")
    if not _is_delegation(replaced or _class_forward(wrapper), wrapper):
        raise ValueError(
            f"{name} computes in a forward of its own, outside of the layers, which a rollout would lose: {_INSTEAD}"
        )


def _check_hooks(wrapper: nn.Module) -> None:
    """Raise `ValueError` for a wrapper with hooks that a rollout would lose."""
    name = _name(wrapper)
    for hook in hooks_of(wrapper):
        if not origin_of(hook).startswith(_PASSES_THROUGH):
            raise ValueError(
                f"a forward hook ({origin_of(hook)}) is registered on {name}, a wrapper that rollouts do not run through: "
                "register it on the model inside (get_base_model()), or remove it"
            )
    steering: Any = getattr(wrapper, "_enable_peft_forward_hooks", None)
    if steering is not None:
        before = sum(1 for module in wrapper.modules() for _ in hooks_of(module))
        with steering():
            during = sum(1 for module in wrapper.modules() for _ in hooks_of(module))
        if during != before:
            raise ValueError(f"{name} steers its layers by hooks during its own forward: {_INSTEAD}")


def _check_adapters(model: Any) -> None:
    """Raise `ValueError` for an active adapter that changes the inputs, or depends on them."""
    names = model.active_adapters
    for config in (model.peft_config[name] for name in ([names] if isinstance(names, str) else names)):
        if config.is_prompt_learning:
            raise ValueError(
                f"prompt-learning adapters (here {config.peft_type.value}) change the inputs, not the layers, and are lost "
                f"in a rollout: {_INSTEAD}"
            )
        if config.peft_type.value in _MIXES_TOKENS:
            raise ValueError(
                f"the PEFT method {config.peft_type.value} averages over all tokens of a batch, so that a completion would "
                f"depend on its neighbours: {_INSTEAD}"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                "activated LoRA (alora_invocation_tokens) begins at its invocation tokens, which the wrapper looks for in "
                f"the inputs and a rollout would not: train it without alora_invocation_tokens, or {_INSTEAD}"
            )


def _plain_forwards(wrapper: nn.Module) -> tuple[Any, ...]:
    """Forwards of PEFT and torch that call the inner module with the same inputs and return its logits."""
    if isinstance(wrapper, _PARALLEL):
        return tuple(kind.forward for kind in _PARALLEL)
    from peft import AdaLoraModel, PeftMixedModel, PeftModel, PeftModelForCausalLM, PeftModelForFeatureExtraction
    from peft.tuners.tuners_utils import BaseTuner

    kinds = (PeftModel, PeftModelForCausalLM, PeftModelForFeatureExtraction, PeftMixedModel, BaseTuner)
    return (*(kind.forward for kind in kinds), AdaLoraModel.forward)  # AdaLoRA only adds to the loss


def _is_delegation(forward: Any, wrapper: Any) -> bool:
    """Whether a wrapper's replaced forward is the original one, or the forward of the inner module."""
    while True:
        owner, function = getattr(forward, "__self__", wrapper), getattr(forward, "__func__", forward)
        if owner is getattr(wrapper, "model", None) and owner is not None:
            return True
        if owner is not wrapper:
            return False
        if function in _plain_forwards(wrapper):
            return True
        if not origin_of(function).startswith(_PASSES_THROUGH) or not hasattr(function, "__wrapped__"):
            return False
        forward = function.__wrapped__


def _class_forward(wrapper: nn.Module) -> Any:
    own_call = type(wrapper).__call__ is not nn.Module.__call__
    return type(wrapper).__call__ if own_call else type(wrapper).forward


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Forward hooks of a module itself, not of its children."""
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def origin_of(function: Any) -> str:
    """Module that defines a callable's code; a decorator's `__module__` names the decorated function's."""
    if isinstance(function, functools.partial):
        return origin_of(function.func)
    function = getattr(function, "__func__", function)
    globals_ = getattr(function, "__globals__", None)
    return str(type(function).__module__ if globals_ is None else globals_.get("__name__", ""))


def _name(wrapper: Any) -> str:
    """The PEFT method if there is one, else the wrapper's class."""
    configs = getattr(wrapper, "peft_config", None)
    if not isinstance(configs, dict):
        return type(wrapper).__name__
    methods = {getattr(config.peft_type, "value", str(config.peft_type)) for config in configs.values()}
    return f"the PEFT method {', '.join(sorted(methods))} ({type(wrapper).__name__})"
