"""Runs a policy with the trainer's own weights: no second copy, nothing to sync."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas_rl.policy import ragged_attention
from atlas_rl.policy.attention_backends import without_cudnn
from atlas_rl.policy.autocast import HalfWeights
from atlas_rl.policy.base import PolicyRunner, Segments, Taps
from atlas_rl.policy.calling import ForwardCall
from atlas_rl.policy.compiled import uncompiled
from atlas_rl.policy.cpu_linear import FastLinears
from atlas_rl.policy.current_device import on_device
from atlas_rl.policy.flat_layers import flat
from atlas_rl.policy.fused_layers import fused
from atlas_rl.policy.logits import rows_not_finite
from atlas_rl.policy.memory import free_bytes
from atlas_rl.policy.parts import ListedModules
from atlas_rl.policy.probe import Probed, probe
from atlas_rl.policy.ragged_attention import RaggedBatch
from atlas_rl.policy.recurrent_layers import RecurrentLayer, recurrent_layers
from atlas_rl.policy.recurrent_rows import RecurrentRows
from atlas_rl.policy.step_graphs import SIZES, StepGraphs
from atlas_rl.policy.step_tail import StepTail
from atlas_rl.policy.supported import context_of, refuse_layers, refuse_modules
from atlas_rl.policy.threads import (
    attending,
    evaluation_mode,
    generating,
    replaced_forwards,
    stand_ins,
    watched_forwards,
)
from atlas_rl.policy.unwrap import unwrap_policy

logger = logging.getLogger(__name__)

_UNCAPTURED = (
    "atlas_rl: %s cannot run as a CUDA graph (%s): its decode steps are launched kernel by kernel, which takes several "
    "times as long for a small batch"
)
_SHORT_OF_MEMORY = (
    "atlas_rl: %s had no memory left for the CUDA graph of a decode step: this call launches its steps kernel by kernel, "
    "and the next call tries again. Leave more memory free, or lower max_batch_size"
)
_TAILS_APART = (
    "atlas_rl: %s's decode steps are captured as CUDA graphs, but verification cannot be part of them (%s): it is launched "
    "behind each, which takes some launches and copies more"
)


class InProcessRunner(PolicyRunner):
    """Runs any Hugging Face causal LM whose layers attend to the row's own tokens: Llama, Qwen, Gemma, GPT-2, ...

    Some recurrent layers can be run as well (`policy/recurrent_layers.py`).

    A policy whose configuration shows that it cannot be run is refused at once. Any other is probed before its first
    forward (`policy/probe.py`).

    Args:
        model: The policy, or a wrapper around it. Only read.
        is_placed: Whether its weights are on the device where it will run; with sharding they may arrive later.

    Attributes:
        config: The policy's text configuration.
        call: Runs its forward.
        recurrent: Its layers with a running state, by layer number.
        max_context: Longest text that it can be run over, see `policy/supported.py`.

    Raises:
        ValueError: Not a causal LM, or one whose attention cannot be run this way.
    """

    def __init__(self, model: nn.Module, *, is_placed: bool = True) -> None:
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
        self.recurrent = recurrent_layers(self.model)
        refuse_layers(self.config, type(self.model).__name__, self.recurrent)
        if is_placed:
            refuse_modules(self.model)
        self.vocab_size = int(head.weight.shape[0]) if head.weight.numel() else int(self.config.vocab_size)
        self.call = ForwardCall(self.model, self.vocab_size)
        self.max_context = context_of(self.model, self.config)
        self._cache: RaggedBatch | None = None
        self.own_attention: str = self.config._attn_implementation
        self._probed: Probed | None = None
        self._asked: torch.cuda.Event | None = None  # of the last forward or copy
        self._uncaptured: str | None = None  # why its steps cannot be captured, once a capture has failed
        self._said: set[str] = set()  # what was logged
        self.linears = FastLinears(self.model)
        self.halves = HalfWeights(self.model, lambda: self.free_bytes())
        self._autocast: torch.dtype | None = None  # of the latest forward; the probe runs the first ones
        self._fuses = True  # norms, rotary embeddings and gates, unless this makes the probe fail
        self._unrunnable: tuple[np.ndarray | None] | None = None  # of the session, computed on first use

    @property
    def device(self) -> torch.device:
        """Device of the policy's embeddings."""
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def _layers(self) -> nn.ModuleList:
        return decoder_layers(self.model, self.config.num_hidden_layers)

    def new_cache(self, num_rows: int, capacity: int) -> RaggedBatch:
        # transformers' SDPA path ignores `softcap`, its other paths apply it: do as the trainer's own forward does.
        softcap = self.config._attn_implementation != "sdpa"
        states = RecurrentRows(num_rows) if self.recurrent else None
        return RaggedBatch(num_rows, capacity, honour_softcap=softcap, free_bytes=self.free_bytes, recurrent=states)

    @contextmanager
    def session(self, cache: RaggedBatch) -> Iterator[None]:
        with generating(), torch.no_grad():
            if cache.parts is not None and not cache.parts.are_unchanged():
                cache.parts = None
            if cache.parts is None:
                refuse_modules(self.model)  # may have been offloaded since
            with on_device(self.device), evaluation_mode(self._parts_of(cache)):
                self._look()
                self._unrunnable = None  # weights may have changed
                with self.ragged(cache):
                    yield

    def forward(
        self, segments: Segments, keep: np.ndarray, taps: Taps | None = None, tail: StepTail | None = None
    ) -> torch.Tensor:
        assert self._cache is not None, "forward() outside of session()"
        steps = self._steps_of(self._cache)
        if steps is not None and steps.serves(segments, keep):
            self.linears.prepare(len(segments.token_ids))
            logits = self._step(steps, self._cache, segments, taps or Taps(), tail)
        else:
            logits = self.run(segments, keep, taps)
        self._mark()
        return logits

    def run(
        self, segments: Segments, keep: np.ndarray, taps: Taps | None = None, shift: np.ndarray | None = None
    ) -> torch.Tensor:
        """`forward` without fixed shapes, with positions moved by `shift`, int64 `[num_tokens]`; for the probe.

        Later forwards do not overwrite the result.
        """
        batch = self._cache
        assert batch is not None, "forward() outside of session()"
        self.linears.prepare(len(segments.token_ids), recurs=bool(segments.starts.any()))
        if isinstance(segments.token_ids, torch.Tensor):
            (wanted,), tokens = batch.place(segments, self.device, keep), segments.token_ids.to(self.device)
        else:
            wanted, tokens = batch.place(segments, self.device, keep, segments.token_ids)
        positions = batch.placed.token_positions
        if shift is not None:
            positions = positions + torch.from_numpy(shift).to(self.device)
        return self._run(batch, tokens, positions, wanted, taps or Taps())

    def _run(
        self, cache: RaggedBatch, tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor, taps: Taps
    ) -> torch.Tensor:
        """Run the policy over tokens that have been placed in `cache`."""
        layers = self._layers if taps.wants_layers else nn.ModuleList()
        attention = attending(ragged_attention.NAME, self.config)
        mixers = {each.module: partial(_recur, cache, layer, each) for layer, each in self.recurrent.items()}
        with ragged_attention.active(cache), attention, replaced_forwards(mixers), _tapped(self.model, layers, taps):
            logits = self.call(tokens, positions, keep)
        self._autocast = cache.autocast
        if taps.wants_head_inputs and not self.call.keeps:
            taps.head_inputs = taps.head_inputs[keep]
        return logits.float().contiguous()

    def _steps_of(self, cache: RaggedBatch) -> StepGraphs | None:
        """Decode steps of fixed shapes over this cache, if its attention and the policy allow them."""
        if cache.steps is None and self._uncaptured is None:
            capture = self.device.type == "cuda"
            if cache.takes_steps:
                cache.steps = StepGraphs(lambda cache: partial(self._run, cache), capture=capture)
            elif capture and cache.why_no_steps is not None:
                self._say_uncaptured(cache.why_no_steps)
        return cache.steps

    def _step(
        self, steps: StepGraphs, cache: RaggedBatch, segments: Segments, taps: Taps, tail: StepTail | None
    ) -> torch.Tensor:
        tail = None if _TAILS_APART in self._said else tail
        logits = steps.run(cache, segments, taps, (cache.parts, *stand_ins()), tail)
        if steps.short_of_memory:  # that passes: the next call tries again
            if self._is_new(_SHORT_OF_MEMORY):
                logger.warning(_SHORT_OF_MEMORY, type(self.model).__name__)
        elif steps.refused is not None and self._uncaptured is None:
            self._uncaptured = steps.refused
            self._say_uncaptured(steps.refused)
        elif steps.tails_refused is not None and steps.captured and self._is_new(_TAILS_APART):
            logger.warning(_TAILS_APART, type(self.model).__name__, steps.tails_refused)
        return logits

    def _say_uncaptured(self, why: str) -> None:
        """Log a cause once."""
        if self._is_new(why):
            logger.warning(_UNCAPTURED, type(self.model).__name__, why)

    def _is_new(self, said: str) -> bool:
        """Whether this is asked for the first time, so that it is to be logged."""
        is_new = said not in self._said
        self._said.add(said)
        return is_new

    @property
    def works_beside_host(self) -> bool:
        return self.device.type != "cpu"

    @property
    def once_s(self) -> float:
        steps = None if self._cache is None else self._cache.steps
        return self.linears.once_s + (0.0 if steps is None else steps.capture_s)

    @property
    def step_sizes(self) -> tuple[int, ...]:
        cache = self._cache
        if cache is None or not cache.takes_steps or self._uncaptured is not None:
            return ()
        return SIZES if cache.steps is None or cache.steps.refused is None else ()

    def unrunnable(self) -> np.ndarray | None:
        if self._unrunnable is None:
            self._unrunnable = (rows_not_finite(self.model.get_input_embeddings().weight, self.vocab_size),)
        return self._unrunnable[0]

    def copy_rows(self, source: int, targets: Sequence[int], length: int) -> None:
        assert self._cache is not None, "copy_rows() outside of session()"
        self._cache.copy_rows(source, np.array(targets, np.int64), length)
        self._mark()

    def row_bytes(self, capacity: int) -> int:
        """Cache bytes of one row of `capacity` tokens."""
        with torch.no_grad(), evaluation_mode(self.model):
            return self._look().token_bytes * capacity + self._look().state_bytes

    def check_reach(self, tokens: int) -> None:
        """Raise `ValueError` if rows of `tokens` tokens would depend on their neighbours or need a missing mask."""
        with torch.no_grad(), evaluation_mode(self.model):
            reach = self._look().reach
        if reach is not None:
            reach.check(tokens, type(self.model).__name__)

    def free_bytes(self) -> int:
        """Bytes that the cache may take now, beyond those that it has."""
        return free_bytes(self.device)

    def cells_that_fit(self) -> int:
        cache = self._cache
        assert cache is not None, "cells_that_fit() outside of session()"
        return cache.cells_that_fit(self._cell_bytes(cache))

    @property
    def state_cells(self) -> int:
        cache = self._cache
        assert cache is not None, "state_cells outside of session()"
        return -(-(cache.state_bytes or self._look().state_bytes) // max(1, self._cell_bytes(cache)))

    def _cell_bytes(self, cache: RaggedBatch) -> int:
        return cache.cell_bytes or self._look().token_bytes

    @property
    def held_cells(self) -> int:
        cache = self._cache
        assert cache is not None, "held_cells outside of session()"
        return cache.held_cells

    def reserve(self, num_rows: int, length: int) -> None:
        cache = self._cache
        assert cache is not None, "reserve() outside of session()"
        if num_rows > cache.held_rows or length > cache.held_cells:
            cache.reserve(num_rows, length, self.cells_that_fit() - num_rows * self.state_cells)

    def synchronize(self) -> None:
        if self._asked is not None:
            self._asked.synchronize()
            self._asked = None

    def _mark(self) -> None:
        """Mark the present end of the device's queue."""
        if self.device.type == "cuda":
            self._asked = torch.cuda.Event()
            self._asked.record()

    @contextmanager
    def ragged(self, cache: RaggedBatch) -> Iterator[None]:
        """Context in which forwards run over `cache`."""
        outer, parts = self._cache, self._parts_of(cache)
        try:
            self._cache = cache
            with (
                uncompiled(parts),
                fused(parts) if self._fuses else nullcontext(),
                self.linears.installed(parts),
                flat(parts, self.linears) if self._fuses else nullcontext(),
                self.halves.installed(self._autocast, parts) as outdated,
            ):
                if outdated and cache.steps is not None:
                    cache.steps.forget()
                yield
        finally:
            self._cache = outer

    def _parts_of(self, cache: RaggedBatch) -> ListedModules:
        """The policy's modules, listed when this cache is first run over, and again when a session finds them changed.

        A draft LM enters a session for every draft. What is kept with the list serves all of them.
        """
        if cache.parts is None:
            cache.parts = ListedModules(self.model)
            if cache.steps is not None:
                cache.steps.forget()  # they would keep the former list, and what is kept with it
        return cache.parts

    @contextmanager
    def attention(self, name: str) -> Iterator[None]:
        """Context in which the policy's layers call the attention function of this name, in this thread."""
        with uncompiled(self.model), attending(name, self.config), without_cudnn():
            yield

    def _look(self) -> Probed:
        """Probe the policy, with gradients off and modules in evaluation mode."""
        if self._probed is None:
            with on_device(self.device):
                self._probed = self._probe()
        return self._probed

    def _probe(self) -> Probed:
        try:
            return probe(self)
        except ValueError as error:
            self._fuses = False
            probed = probe(self)  # raises again, if that was not the cause
            logger.warning(
                "atlas_rl: %s runs its norms, rotary embeddings and gates unfused, in several operations each: in one "
                "pass each they fail here (%s)", type(self.model).__name__, error,
            )  # fmt: skip
            return probed


def _recur(
    cache: RaggedBatch, layer: int, own: RecurrentLayer, module: nn.Module, hidden_states: torch.Tensor, **_: Any
) -> torch.Tensor:
    """Run a recurrent layer over the rows of a cache; the mask is ignored because there is no padding."""
    return own.forward(hidden_states, lambda inputs: cache.recur(layer, inputs, own))


@contextmanager
def _tapped(model: Any, layers: nn.ModuleList, taps: Taps) -> Iterator[None]:
    """Context in which `taps` captures inputs of the LM head and of the requested layers, in this thread."""

    def catch_last(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else next(iter(kwargs.values()))
        taps.head_inputs = states.reshape(-1, states.shape[-1])
        return forward(*args, **kwargs)

    def catch_layer(layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        out = forward(*args, **kwargs)
        ends = {layer: states, layer + 1: out[0] if isinstance(out, tuple) else out}
        taps.layers |= {n: ends[n].reshape(-1, ends[n].shape[-1]) for n in taps.wants_layers if n in ends}
        return out

    # The last layer's output is the input of no layer.
    watched = {min(n, len(layers) - 1) for n in taps.wants_layers}
    watchers: dict[nn.Module, Callable[..., Any]] = {layers[n]: partial(catch_layer, n) for n in watched}
    if taps.wants_head_inputs:
        watchers[model.get_output_embeddings()] = catch_last
    with watched_forwards(watchers):
        yield


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The policy's stack of decoder layers; `ValueError` if it cannot be identified."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} stacks of {num_layers} layers: hidden states need one"
        )
    return found[0]
