"""Traces each layer's attention in a plain forward: its mask, its window, and the sizes of keys and values.

transformers looks up attention functions and mask builders by name. Under the name registered here, three tokens are
run with a mask builder that records the *rule* of each mask (may query q see cell k?) and an attention function that
records its arguments. A rule can be evaluated at any position, so a window or a chunk of any size is compared with what
the ragged attention would hide, without running a text of that length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from atlas_rl.policy.autocast import as_attended
from atlas_rl.policy.handed_on import HandedOn
from atlas_rl.policy.supported import REMEDY, Reach, fields_of, nearest

NAME = "atlas_traced"
HORIZON = 1 << 18  # positions up to which rules are compared

Rule = Callable[..., Any]
"""transformers' mask function: batch index, head index, query position, cell position to "may see"."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Arguments of one layer's attention call.

    Attributes:
        rule: Rule of its mask; None if transformers' mask builder did not make the mask.
        window: Sliding window that it received.
        token_bytes: Cache bytes of one token's keys and values; 0 if those are an earlier layer's.
    """

    rule: Rule | None
    window: int | None
    token_bytes: int


@dataclass(slots=True)
class Trace:
    """Attention calls of one plain forward.

    Attributes:
        masks: Every mask that was built, with its rule; kept alive, because masks are told apart by their memory.
        calls: Calls of each layer.
        unnumbered: Calls by modules without a layer number.
        handed_on: Keys and values of the layers so far.
    """

    masks: list[tuple[torch.Tensor, Rule]] = field(default_factory=list)
    calls: dict[int, list[AttentionCall]] = field(default_factory=dict)
    unnumbered: int = 0
    handed_on: HandedOn = field(default_factory=HandedOn)

    @property
    def windows(self) -> list[int]:
        """Sliding windows that attention functions received, smallest first."""
        return sorted({c.window for calls in self.calls.values() for c in calls if c.window is not None})

    @property
    def token_bytes(self) -> int:
        """Cache bytes of one token, over all layers."""
        return sum(call.token_bytes for calls in self.calls.values() for call in calls)


_current: ContextVar[Trace | None] = ContextVar("atlas_traced", default=None)


@contextmanager
def tracing() -> Iterator[Trace]:
    """Context in which attention calls under `NAME` are recorded and return zeros."""
    trace = Trace()
    token = _current.set(trace)
    try:
        yield trace
    finally:
        _current.reset(token)


def refuse_structure(trace: Trace, attending: Set[int], name: str) -> None:
    """Raise `ValueError` for a policy `name` whose attention cannot run over a ragged batch, with the reason.

    `attending` are the numbers of the layers that have attention.
    """
    calls = trace.calls
    if attending and not calls and not trace.unnumbered:
        _refuse(name, "does not run its attention through transformers' attention interface (AttentionInterface)")
    if trace.unnumbered:
        _refuse(name, "has attention modules that do not say which layer they are (layer_idx)")
    if repeated := [layer for layer, of_layer in sorted(calls.items()) if len(of_layer) > 1]:
        _refuse(name, f"calls the attention of some layers more than once in a forward: {_listed(repeated)}")
    if missing := sorted(attending - set(calls)):
        _refuse(name, f"has layers that do not call transformers' attention interface: {_listed(missing)}")
    rules = {of_layer[0].rule for of_layer in calls.values()} - {None}
    query, cell = torch.arange(2, device="cpu")
    if any(bool(rule(0, 0, query, cell)) for rule in rules if rule is not None):
        _refuse(name, "is not causal: a token sees those that come later (BERT and kin need is_decoder=True)")
    if own := [layer for layer, of_layer in sorted(calls.items()) if of_layer[0].rule is None]:
        _refuse(name, f"builds masks of its own, which a ragged batch cannot be given: layers {_listed(own)}")


def _refuse(name: str, found: str) -> None:
    raise ValueError(f"{name} {found}, so that rows of different lengths cannot be run together: {REMEDY}")


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")


def mask_reach(trace: Trace, config: Any, max_context: int | None) -> Reach | None:
    """Length up to which the ragged attention and each layer's own mask hide the same cells; None if unlimited."""
    pairs = {(call.rule, call.window) for calls in trace.calls.values() for call in calls}
    return nearest(_pair_reach(rule, window, config, max_context) for rule, window in pairs if rule is not None)


def _pair_reach(rule: Rule, window: int | None, config: Any, max_context: int | None) -> Reach | None:
    last = min(max_context or HORIZON, HORIZON) - 1
    edges = {1, 2, 3, last // 3, last // 2, last - 1, last}
    for size in {window, *fields_of(config, "sliding_window"), *fields_of(config, "attention_chunk_size")} - {None}:
        edges |= {int(size) - 1, int(size), int(size) + 1}
    differing = [q for q in sorted(edges) if 0 < q <= last and not _same(rule, window, q)]
    if not differing:
        return None
    low, high = 0, differing[0]  # both hide more and more as the query moves on: bisect for the first that differs
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _same(rule, window, middle) else (low, middle)
    sizes = {name: fields_of(config, name) for name in ("sliding_window", "attention_chunk_size")}
    cause = next((f" ({name}={high})" for name, values in sizes.items() if high in values), "")
    return Reach(high, f"its mask hides other tokens{cause} than its attention function is told of")


def _same(rule: Rule, window: int | None, query: int) -> bool:
    """Whether mask and attention function agree for a query position, on every cell up to some after it."""
    cells = torch.arange(query + 4, device="cpu")
    ours = cells <= query
    if window is not None:
        ours &= cells > query - window
    try:
        theirs = rule(0, 0, torch.tensor(query, device="cpu"), cells)
    except IndexError:  # the rule looks something up that exists for the traced tokens only
        return query < 3
    return bool((theirs.expand_as(ours) == ours).all())


def _traced_mask(
    *, mask_function: Rule = causal_mask_function, use_vmap: bool = False, **options: Any
) -> torch.Tensor | None:
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(mask_function=mask_function, use_vmap=use_vmap, **options)
    trace = _current.get()
    if trace is not None and mask is not None and not use_vmap:  # with vmap, the rule is custom code
        trace.masks.append((mask, mask_function))
    return mask


def _traced_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    trace = _current.get()
    if trace is None:
        raise RuntimeError(f"attention '{NAME}' runs only while a policy is traced")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        trace.unnumbered += 1
    else:
        size = sum(kept.element_size() * kept.shape[1] * kept.shape[3] for kept in as_attended(key, value))
        if trace.handed_on.first_layer(int(layer), key, value) != layer:
            size = 0
        rule = _rule_of(trace, module, attention_mask)
        trace.calls.setdefault(int(layer), []).append(AttentionCall(rule, sliding_window, size))
    batch, heads, tokens, _ = query.shape
    return value.new_zeros(batch, tokens, heads, value.shape[3]), None


def _rule_of(trace: Trace, module: torch.nn.Module, mask: torch.Tensor | None) -> Rule | None:
    if mask is None:
        return causal_mask_function if getattr(module, "is_causal", True) else None
    memory = mask.untyped_storage().data_ptr()
    return next((rule for built, rule in trace.masks if built.untyped_storage().data_ptr() == memory), None)


AttentionInterface.register(NAME, _traced_attention)
AttentionMaskInterface.register(NAME, _traced_mask)
