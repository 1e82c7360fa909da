"""Runs a policy with the trainer's own weights: no second copy, nothing to sync."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas_rl.policy import ragged_attention
from atlas_rl.policy.base import PolicyRunner, Segments, Taps
from atlas_rl.policy.cpu_linear import streamed_weights
from atlas_rl.policy.logits import largest_difference, spread
from atlas_rl.policy.ragged_attention import RaggedBatch
from atlas_rl.policy.unwrap import unwrap_policy

_PROBE_TOLERANCE = 2e-2  # of the logits' spread; a wrong cache or mask is off by the spread itself
_MEMORY_SHARE = {"cuda": 0.6, "cpu": 0.3}


class InProcessRunner(PolicyRunner):
    """Any Hugging Face causal LM with a standard attention cache (Llama, Qwen, Gemma, GPT-2 and kin).

    Args:
        model: The policy, or a wrapper around it. Only read: the first session checks on five tokens that a ragged
            forward gives the logits of a plain one.

    Raises:
        ValueError: Not a causal LM, or one whose attention cannot be run this way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = unwrap_policy(model)
        config = getattr(self.model, "config", None)
        if config is None or not hasattr(self.model, "get_output_embeddings"):
            raise ValueError(
                f"the policy must be a transformers causal LM, got {type(self.model).__name__}: "
                "load it with AutoModelForCausalLM"
            )
        head = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(self.model).__name__} has no LM head: load it with AutoModelForCausalLM")
        if getattr(config, "is_encoder_decoder", False) or not self.model.can_generate():
            raise ValueError(f"{type(self.model).__name__} is not a causal LM: load one with AutoModelForCausalLM")
        self.config = config.get_text_config()
        if not hasattr(self.config, "num_attention_heads"):
            raise ValueError(
                f"{type(self.model).__name__} has no standard attention cache: generate with the trainer's own engine"
            )
        self.vocab_size = int(head.weight.shape[0]) if head.weight.numel() else int(self.config.vocab_size)
        self.max_context = getattr(self.config, "max_position_embeddings", None)
        self._cache: RaggedBatch | None = None
        self._attention = self.config._attn_implementation
        self._probed = False

    @property
    def device(self) -> torch.device:
        """Where the policy's embeddings live."""
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def _layers(self) -> nn.ModuleList:
        return decoder_layers(self.model, self.config.num_hidden_layers)

    def new_cache(self, num_rows: int, capacity: int) -> RaggedBatch:
        # transformers' SDPA path ignores `softcap`, its other paths apply it: do as the trainer's own forward does.
        return RaggedBatch(num_rows, capacity, honour_softcap=self.config._attn_implementation != "sdpa")

    @contextmanager
    def session(self, cache: RaggedBatch) -> Iterator[None]:
        with torch.no_grad(), evaluation_mode(self.model):
            if not self._probed:
                self._probe()
            with self._ragged(cache):
                yield

    def forward(self, segments: Segments, keep: np.ndarray, taps: Taps | None = None) -> torch.Tensor:
        batch = self._cache
        assert batch is not None, "forward() outside of session()"
        batch.place(segments, self.device)
        assert batch.token_positions is not None
        taps = taps or Taps()
        layers = self._layers if taps.wants_layers else nn.ModuleList()
        with ragged_attention.active(batch), _tapped(self.model, layers, taps):
            output = self.model(
                input_ids=torch.from_numpy(segments.token_ids)[None].to(self.device),
                position_ids=batch.token_positions[None],
                use_cache=False,
                logits_to_keep=torch.from_numpy(keep).to(self.device),
            )
        return output.logits[0].float().contiguous()

    def copy_rows(self, source: int, targets: Sequence[int], length: int) -> None:
        assert self._cache is not None, "copy_rows() outside of session()"
        self._cache.copy_rows(source, np.array(targets, np.int64), length)

    def row_bytes(self, capacity: int) -> int:
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        element = self.model.get_input_embeddings().weight.element_size()
        return 2 * config.num_hidden_layers * heads * dim * element * capacity

    def free_bytes(self) -> int:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return int((free + held) * _MEMORY_SHARE["cuda"])
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _MEMORY_SHARE["cpu"])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _ragged(self, cache: RaggedBatch) -> Iterator[None]:
        own, outer = self.config._attn_implementation, self._cache
        self._cache = cache
        self.config._attn_implementation_internal = ragged_attention.NAME
        try:
            with streamed_weights(self.model):
                yield
        finally:
            self.config._attn_implementation_internal = own
            self._cache = outer

    def _probe(self) -> None:
        """Five tokens through a plain forward, and as a ragged batch in two segments: the logits must agree."""
        tokens = np.array([1, 3, 2, 4, 1], dtype=np.int64) % self.vocab_size
        outer = self.config._attn_implementation  # ragged, when the policy drafts for itself in a session of its own
        self.config._attn_implementation_internal = self._attention
        try:
            plain = self.model(input_ids=torch.from_numpy(tokens)[None].to(self.device), use_cache=False).logits[0]
        finally:
            self.config._attn_implementation_internal = outer
        plain = plain.float()
        with self._ragged(self.new_cache(2, 5)):
            split = np.array([3, 2])
            first = Segments(np.concatenate([tokens[:3], tokens[:2]]), 0, np.zeros(2, np.int64), split)
            self.forward(first, np.arange(5))
            second = Segments(np.concatenate([tokens[3:], tokens[2:]]), 0, split, 5 - split)
            ragged = self.forward(second, np.arange(5))
        error = largest_difference(ragged, torch.cat([plain[3:], plain[2:]]))
        if error is None:
            return  # nothing to compare: sampling says so, and knows whether this is the policy or a draft LM
        if not error <= _PROBE_TOLERANCE * spread(plain) + 1e-4:
            raise ValueError(
                f"{type(self.model).__name__} does not give the same logits with a ragged cache as without one (largest "
                f"difference {error:.3g}): it has no standard attention cache. Generate with the trainer's own engine."
            )
        self._probed = True


@contextmanager
def _tapped(model: nn.Module, layers: nn.ModuleList, taps: Taps) -> Iterator[None]:
    """Inside, `taps` catches the inputs of the LM head and of the decoder layers it asks for."""

    def catch_last(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        taps.head_inputs = args[0].reshape(-1, args[0].shape[-1])

    def catch_layer(layer: int) -> Callable[..., None]:
        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            taps.layers[layer] = states.reshape(-1, states.shape[-1])

        return catch

    handles = []
    try:
        if taps.wants_head_inputs:
            handles.append(model.get_output_embeddings().register_forward_pre_hook(catch_last))  # type: ignore[operator]
        for layer in taps.wants_layers:
            handles.append(layers[layer].register_forward_pre_hook(catch_layer(layer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The policy's stack of decoder layers; `ValueError` if it has none that can be told."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} stacks of {num_layers} layers: hidden states need one"
        )
    return found[0]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, and every module's own training flag put back (they may differ between modules)."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
