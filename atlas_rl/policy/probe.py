"""Compares the ragged forward of a policy with plain forwards, once, before anything is generated.

Three checks, from exact and cheap to costly:

1. A trace of three tokens (`policy/traced.py`): does every layer run its attention through the ragged cache, and does its
   mask hide exactly what the ragged attention hides, at every length?
2. A row at the farthest positions beside one at the first: does anything depend on the batch's longest text?
3. Values: a short row and a long one, in cache rows that are not adjacent, are compared with plain forwards at every
   position: a prompt, two tokens as in verification, then one token per forward as in decoding. The long row extends
   past the smallest window if that is affordable: within `_FLOPS` floating-point operations, `_LOGIT_BYTES` of logits
   and `_MAX_TOKENS` tokens. Otherwise it has `_FEW` tokens. Custom code in the policy (`policy/own_code.py`) may depend
   on lengths and tokens, so then the long row is as long as affordable, with tokens from the whole vocabulary.

The policy is left unchanged: mode, random state, rotary frequencies. Cost: a dozen forwards of a few tokens and, if
there is a window or custom code to check, two long ones, which `_FLOPS` bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from atlas_rl.policy import traced
from atlas_rl.policy.base import Segments
from atlas_rl.policy.calling import ForwardCall
from atlas_rl.policy.logits import rows_not_finite, rows_that_differ
from atlas_rl.policy.own_code import own_code
from atlas_rl.policy.ragged_attention import RaggedBatch
from atlas_rl.policy.recurrent_layers import RecurrentLayer
from atlas_rl.policy.supported import REMEDY, Reach, layers_that_attend, nearest, reach_of
from atlas_rl.policy.threads import watched_forwards

_FLOPS = {"cpu": 1e11, "cuda": 1e13}  # about a second of a CPU, and a twentieth of a second of a GPU
_LOGIT_BYTES = 1 << 28
_MAX_TOKENS = 4160  # past a window of 4,096, the widest that is common among small policies
_FEW, _SHORT = 12, 9  # tokens of the long row if no window can be reached, and of the short row
_TAIL = (2, 1, 1, 1, 1)  # tokens of a row's segments after its prompt
_TOLERANCE = {True: 2e-3, False: 2e-2}  # of the logits' spread, in float32 and below; a wrong mask is off by all of it
_FAILURES = (TypeError, AttributeError, LookupError, AssertionError, RuntimeError)


class Probeable(Protocol):
    """What the probe needs from a runner; see `InProcessRunner`."""

    model: Any
    config: Any
    call: ForwardCall
    recurrent: dict[int, RecurrentLayer]
    vocab_size: int
    max_context: int | None
    own_attention: str

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, num_rows: int, capacity: int) -> RaggedBatch: ...

    def ragged(self, cache: RaggedBatch) -> AbstractContextManager[None]: ...

    def attention(self, name: str) -> AbstractContextManager[None]: ...

    def run(self, segments: Segments, keep: np.ndarray, *, shift: np.ndarray | None = None) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Probed:
    """Findings about a policy that can be run.

    Attributes:
        token_bytes: Cache bytes of one token, over all layers.
        state_bytes: Bytes that a row takes in addition to its tokens.
        reach: Length up to which a ragged forward is right; None if unlimited.
    """

    token_bytes: int
    state_bytes: int
    reach: Reach | None


def probe(runner: Probeable) -> Probed:
    """Probe a policy; gradients must be off, and every module in evaluation mode.

    Raises:
        ValueError: It cannot be run over a ragged batch; the message says what was found, and what to do.
    """
    devices = [runner.device] if runner.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _kept_frequencies(runner.model):
        return _Probe(runner).look()


class _Probe:
    def __init__(self, runner: Probeable) -> None:
        self._runner, self._config, self._name = runner, runner.config, type(runner.model).__name__
        self._exact, self._state_bytes = False, 0
        unrunnable = rows_not_finite(self._runner.model.get_input_embeddings().weight, self._runner.vocab_size)
        known = np.arange(self._runner.vocab_size)
        # If none is finite, the logits show it.
        self._runnable = known if unrunnable is None or unrunnable.all() else known[~unrunnable]

    def look(self) -> Probed:
        self._exact = self._computes_in_float32()
        self._find_out_what_is_kept()
        trace = self._traced()
        reach = nearest([reach_of(self._config), traced.mask_reach(trace, self._config, self._runner.max_context)])
        if reach is not None and reach.tokens <= len(self._tokens(3)):
            raise ValueError(f"{self._name} cannot be run in process: {reach.reason}; {REMEDY}")
        limit = min(self._runner.max_context or traced.HORIZON, reach.tokens if reach else traced.HORIZON)
        for check in (self._far_rows, self._rows):
            self._guarded(lambda check=check: check(limit, trace.windows))  # type: ignore[misc]
        return Probed(trace.token_bytes, self._state_bytes, reach)

    def _tokens(self, count: int) -> np.ndarray:
        """int64 `[count]`: tokens from the whole vocabulary whose embeddings are finite."""
        return self._runnable[(np.arange(count, dtype=np.int64) * 7919 + 1) % len(self._runnable)]

    def _plain(self, token_ids: np.ndarray, first_position: int | None = None) -> torch.Tensor:
        """Logits of one text, `[tokens, vocab]`, by the policy's own attention."""
        ids, positions = torch.from_numpy(token_ids).to(self._runner.device), None
        if first_position is not None:
            positions = torch.arange(len(token_ids), device=self._runner.device) + first_position
        with self._runner.attention(self._runner.own_attention):
            return self._runner.call(ids, positions, None)

    def _computes_in_float32(self) -> bool:
        """Whether the whole forward computes in float32: autocast can be around it or, as in trainers, within it."""
        types: set[torch.dtype] = set()

        def note(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                types.add(output.dtype)
            return output

        with watched_forwards(dict.fromkeys(self._runner.model.modules(), note)):
            self._guarded(lambda: self._plain(self._tokens(1)))
        return types <= {torch.float32, torch.float64}

    def _find_out_what_is_kept(self) -> None:
        """Find out whether `logits_to_keep` works: one row, and the right one."""
        call = self._runner.call
        if not call.keeps:
            return
        tokens = self._tokens(3)
        call.keeps = False
        rows = self._plain(tokens).float()
        call.keeps = True
        with self._runner.attention(self._runner.own_attention):
            kept = call.rows(torch.from_numpy(tokens).to(self._runner.device), torch.tensor([1], device="cpu"))
        call.keeps = kept.shape[:-1] == (1, 1) and not self._off(kept[0].float(), rows[1:2]).any()

    def _traced(self) -> traced.Trace:
        tokens = torch.from_numpy(self._tokens(3)).to(self._runner.device)
        positions = torch.arange(3, device=self._runner.device)

        def run() -> traced.Trace:
            with self._runner.attention(traced.NAME), traced.tracing() as trace:
                self._runner.call(tokens, positions, None)
            return trace

        trace = self._guarded(run)
        layers = getattr(self._config, "decoder_layers", None) or self._config.num_hidden_layers
        attending = layers_that_attend(self._config, int(layers), self._runner.recurrent)
        traced.refuse_structure(trace, attending, self._name)
        return trace

    def _far_rows(self, limit: int, windows: list[int]) -> None:
        """Compare a row at the beginning with one at the farthest positions: neither may affect the other."""
        near = self._tokens(min(4, limit))
        far, first = near[::-1].copy(), max(0, limit - len(near))
        expected = [self._plain(near), self._plain(far, first)]
        with self._runner.ragged(self._runner.new_cache(2, len(near))):
            segments = Segments(np.concatenate([near, far]), 0, np.zeros(2, np.int64), np.array([len(near)] * 2))
            got = self._runner.run(segments, np.arange(2 * len(near)), shift=np.repeat([0, first], len(near)))
        for logits, want in zip(got.split(len(near)), expected, strict=True):
            self._compare(logits, want, f"with rows at positions 0 and {first:,}")

    def _rows(self, limit: int, windows: list[int]) -> None:
        """Compare a short row and a long one."""
        length = min(self._long_row(windows), limit)
        texts = [self._tokens(length)[-min(_SHORT, length) :], self._tokens(length)]
        expected = [self._plain(text) for text in texts]
        cuts = [_cuts(len(text)) for text in texts]
        got = self._in_segments(texts, cuts)
        how = f"with rows of {len(texts[0])} and {len(texts[1])} tokens"
        # Code that reads the previous token of the batch is wrong at the first token of every segment, and right
        # elsewhere.
        firsts = [own_cuts[1:-1] for own_cuts in cuts]
        if any(firsts):
            at_firsts = [torch.cat([rows[i][firsts[i]] for i in range(2)]) for rows in (got, expected)]
            self._compare(at_firsts[0], at_firsts[1], f"at the first tokens of segments, {how}", most=0.4)
        for logits, want, own_firsts in zip(got, expected, firsts, strict=True):
            rest = np.setdiff1d(np.arange(len(logits)), own_firsts).tolist()
            self._compare(logits[rest], want[rest], how)

    def _in_segments(self, texts: list[np.ndarray], cuts: list[list[int]]) -> list[torch.Tensor]:
        """Logits `[tokens, vocab]` of two texts that are run side by side, in cache rows 2 and 0 of 3.

        Args:
            texts: int64 `[tokens]`, the short one and the long one.
            cuts: Where each one's segments begin, and its end: equally many of both.
        """
        pieces: list[list[torch.Tensor]] = [[], []]
        cache = self._runner.new_cache(3, len(texts[1]))
        with self._runner.ragged(cache):
            for starts, stops in pairwise(np.array(cuts).T):
                lengths = stops - starts
                ids = np.concatenate([text[a:b] for text, a, b in zip(texts, starts, stops, strict=True)])
                segments = Segments(ids, 0, starts, lengths, np.array([2, 0]))
                logits = self._runner.run(segments, np.arange(len(ids)))
                for own, part in zip(pieces, logits.split(lengths.tolist()), strict=True):
                    own.append(part)
        self._state_bytes = cache.state_bytes
        return [torch.cat(parts) for parts in pieces]

    def _long_row(self, windows: list[int]) -> int:
        """Number of tokens of the long row."""
        affordable = self._affordable()
        wanted = min((window for window in windows if window >= _FEW), default=0) + _FEW
        if own_code(self._runner.model):
            # Eager attention has a matrix of length times length per head.
            heads = int(getattr(self._config, "num_attention_heads", None) or 1)
            wanted = max(min(affordable, int((_LOGIT_BYTES / (4 * heads)) ** 0.5)), wanted)
        return wanted if wanted <= affordable else _FEW

    def _affordable(self) -> int:
        """Number of tokens that the long row can afford."""
        kind = self._runner.device.type
        weights = sum(parameter.numel() for parameter in self._runner.model.parameters())
        by_flops = _FLOPS["cpu" if kind == "cpu" else "cuda"] / (4 * max(1, weights))  # two forwards, two per weight
        by_bytes = _LOGIT_BYTES / (8 * self._runner.vocab_size)  # two copies in float32
        return int(min(_MAX_TOKENS, by_flops, by_bytes))

    def _off(self, logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """bool `[positions]`: where two rows of logits differ by more than rounding."""
        return rows_that_differ(logits, expected, _TOLERANCE[self._exact])

    def _compare(self, logits: torch.Tensor, expected: torch.Tensor, how: str, most: float = 0.5) -> None:
        """Raise `ValueError` if logits differ; in half precision, if more than a share `most` of the rows differ."""
        off = self._off(logits, expected.float())
        # In half precision a near-tie between experts may fall either way for a token or two. A real error affects all
        # positions of a kind, and each kind is compared separately.
        if bool(off.any() if self._exact else off.float().mean() > most):
            error = float((logits - expected.float())[off].abs().max())
            cause = "something in it depends on more than a row's own tokens and positions"
            if self._ignores_positions():
                cause = "its forward takes no notice of position_ids"
            raise ValueError(
                f"{self._name} does not give the logits of a plain forward {how} in one batch (largest difference "
                f"{error:.3g}): {cause}; {REMEDY}"
            )

    def _ignores_positions(self) -> bool:
        """Whether gaps between positions change nothing."""
        tokens = torch.from_numpy(self._tokens(3)).to(self._runner.device)
        gap = torch.tensor([0, 1, 3], device=self._runner.device)
        with self._runner.attention(self._runner.own_attention):
            plain, gapped = (self._runner.call(tokens, positions, None) for positions in (None, gap))
        return torch.equal(plain, gapped)

    def _guarded(self, run: Callable[[], Any]) -> Any:
        """Call `run()`; errors of the policy's own code are reported as such."""
        try:
            return run()
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            raise ValueError(
                f"{self._name} cannot be run over rows of different lengths: its forward fails on them with "
                f"{type(error).__name__}: {error}; {REMEDY}"
            ) from error


def _cuts(length: int) -> list[int]:
    """Where the segments of a row begin, and its end; a short context cannot hold all of `_TAIL`."""
    starts = (length - sum(_TAIL[i:]) for i in range(len(_TAIL)))
    return [0, *(start for start in starts if start > 0), length]


@contextmanager
def _kept_frequencies(model: nn.Module) -> Iterator[None]:
    """Context that restores rotary modules: some recompute their frequencies for the text at hand."""
    rotary = [
        m for m in model.modules() if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))
    ]
    before = [(dict(module.__dict__), dict(module._buffers)) for module in rotary]
    try:
        yield
    finally:
        for module, (attributes, buffers) in zip(rotary, before, strict=True):
            _put_back(module._buffers, buffers)
            _put_back(module.__dict__, attributes)


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Undo changes and touch nothing else, because other threads may be running the module."""
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if now.get(name) is not value:
            now[name] = value
