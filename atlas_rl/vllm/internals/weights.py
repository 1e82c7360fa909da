"""Loads new weights into a running engine, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from atlas_rl.vllm.checkpoint import check_finite
from atlas_rl.vllm.internals.engine import agree, drafter_of, runner_of
from atlas_rl.vllm.internals.version import since


def load_all_or_nothing(runner: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load a checkpoint layer by layer, as vLLM reloads; on any error the old weights are restored.

    A copy of the old weights is held in host memory during loading. After an error the weights are still read to the end:
    every rank may take part in each of them, and the ranks share errors only then.

    Args:
        runner: A model runner.
        weights: (name, tensor) pairs of the whole checkpoint.

    Raises:
        ValueError: Weights are missing or not finite, or another rank failed. Errors of the iterator or of vLLM
            propagate.
    """
    before: _Snapshot | None = None
    iterator = iter(weights)
    try:
        before = _Snapshot(runner.get_model())
        _reload(runner, iterator)
    except BaseException as error:
        try:
            if before is not None:
                before.restore()
            for _ in iterator:
                pass
        finally:
            agree(f"{type(error).__name__}: {error}")  # the other ranks wait for this one
        raise
    failed = agree(None)
    if failed is not None:
        before.restore()
        raise ValueError(f"another rank could not load the weights: {failed}")


def load_in_place(runner: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load a checkpoint into the live model, tensor by tensor, without a copy. Not for CPUs: see `_reload`.

    Raises:
        ValueError: Weights are missing or not finite; some weights have changed by then.
    """
    model = runner.get_model()
    loaded: set[str] = set()
    for name, tensor in _finite(weights, runner.model_config.dtype):
        loaded |= model.load_weights([(name, tensor)]) or {name}
    _check_complete(model, runner.model_config, loaded)


def reload_weights(llm: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load new weights into an engine of this process and drop caches computed with the old ones.

    If loading fails, the old weights are kept on CPUs. Elsewhere a copy would double the memory of the weights, so some
    weights may have changed by then.

    Args:
        llm: An engine in this process.
        weights: (name, tensor) pairs as in a checkpoint; always read to the end, even after an error.
    """
    runner, drafter = runner_of(llm), drafter_of(llm)
    assert drafter is not None, "a backend is built around an engine with our drafter only"
    iterator = iter(weights)
    try:
        if runner.device.type == "cpu":
            load_all_or_nothing(runner, iterator)
        else:
            drafter.weights_are_whole = False
            load_in_place(runner, iterator)
        drafter.weights_are_whole = True
    finally:
        # TRL merges adapters before the first pair and unmerges them after the last one.
        for _ in iterator:
            pass
        llm.reset_prefix_cache(reset_running_requests=True)
        drafter.weights_changed()


def _reload(runner: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load by vLLM's reload, which only logs missing weights. The only way on CPUs: live weights were packed and dropped."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model, config = runner.get_model(), runner.model_config
    names = {name for name, _ in model.named_parameters()}  # read before loading: tied weights are one parameter here
    initialize_layerwise_reload(model)
    loaded = model.load_weights(_finite(weights, config.dtype))
    _check_complete(model, config, loaded, names)
    finalize_layerwise_reload(model, config)
    _forget_adapters(runner)
    runner.reset_encoder_cache()
    runner.reset_mm_cache()


def _forget_adapters(runner: Any) -> None:
    """Remove adapters, which were trained for the old weights. Before 0.28 vLLM's own reload keeps them."""
    if since("0.28"):
        runner.reset_lora_state()
    else:
        runner.maybe_remove_all_loras(runner.lora_config)


def _check_complete(model: nn.Module, config: Any, loaded: set[str] | None, names: set[str] | None = None) -> None:
    """Raise `ValueError` if weights are missing, as vLLM does when it first loads a model."""
    if config.quantization is not None or loaded is None:
        return
    names = {name for name, _ in model.named_parameters()} if names is None else names
    missing = sorted(names - loaded) + _half_loaded(model)
    if missing:
        raise ValueError(f"the new weights lack {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}")


def _half_loaded(model: nn.Module) -> list[str]:
    """Linear layers under reload that got only some of their parts, such as queries but not keys."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    found = []
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if isinstance(module, LinearBase) and info.can_load() and 0 < info.load_numel < info.load_numel_total:
            found.append(f"a part of {name}")
    return found


def _finite(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        check_finite(name, tensor, dtype)
        yield name, tensor


class _Snapshot:
    """Snapshot of a model: its modules' attributes, and the values of its parameters and buffers."""

    _TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._held = [self._copied(module.__dict__) for module in self._modules]
        own = {
            id(t): t for m in self._modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        }
        self._values = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in own.values()]

    def restore(self) -> None:
        """Restore everything, attributes included: functions in the modules hold packed weights."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for module, held in zip(self._modules, self._held, strict=True):
            module.__dict__.clear()
            module.__dict__.update(self._copied(held))
            get_layerwise_info(module).reset()
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.data.copy_(value)

    def _copied(self, held: dict[str, Any]) -> dict[str, Any]:
        return {name: value.copy() if name in self._TABLES else value for name, value in held.items()}
