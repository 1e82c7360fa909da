"""Compiles kernels before the first measured step: numba and Triton do it once per machine and cache the result.

python -m atlas_rl.decode.compile_kernels
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba.core import event

from atlas_kernels.attend_cpu import compile_attention
from atlas_kernels.decoder_layer_cpu import compile_layer
from atlas_kernels.dispatch import kernels_run_on
from atlas_kernels.few_rows_cpu import compile_products
from atlas_kernels.gate_cpu import compile_gate
from atlas_kernels.jit_cache import num_kernels
from atlas_kernels.layer import rms_norm, rotate
from atlas_kernels.layer_cpu import add_and_norm, rotate_in_place
from atlas_kernels.noise import BLOCK, Stream, request_keys
from atlas_kernels.truncate import truncate
from atlas_kernels.truncation import Truncation
from atlas_rl import progress
from atlas_rl.controller.acceptance import AcceptanceModel
from atlas_rl.controller.arms import Arms, ask_next
from atlas_rl.controller.base import Step
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD
from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.slots import admitted, positive, take_better, weigh, within
from atlas_rl.core import Draft, Hidden, SamplingParams, Sequences
from atlas_rl.counts import asked_of, bounds, tokens_of
from atlas_rl.decode.commit import Settled, commit
from atlas_rl.decode.guard import Faults, GuardedController, GuardedSpeculator
from atlas_rl.decode.propose import merge
from atlas_rl.decode.room import needed_by, rest_of, room_of
from atlas_rl.decode.settling import reached
from atlas_rl.policy.current_device import on_device
from atlas_rl.policy.step_inputs import padded_tokens
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.sampling.by_kernels import FusedVerifier, kernel_temperature
from atlas_rl.sampling.packing import packed_positions, packed_tokens, padded_positions, unpacked
from atlas_rl.sampling.verification import Verifier, choose
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.drawing import choose_among
from atlas_rl.speculators.drawn_rows import committed_places, cut, newest_indices, newest_places, positions_alike
from atlas_rl.speculators.history.speculator import HistorySpeculator

logger = logging.getLogger(__name__)

_WORTH_SAYING_S = 3.0


@cache
def compile_kernels() -> float:
    """Run every CPU kernel once on a toy batch; returns the seconds. Later calls return at once."""
    began = time.perf_counter()
    with announced("CPU", "about a minute"), _counted():
        _run_all()
    return time.perf_counter() - began


def compile_verification(verifier: Verifier, sampling: SamplingParams, vocab_size: int, device: torch.device) -> None:
    """Compile the GPU kernels of verification before the first step; returns at once if all are compiled.

    Args:
        verifier: From `verifier_on`, for the device.
        sampling: Sampling parameters of the call.
        vocab_size: Size of the policy's vocabulary.
        device: Device of the logits.
    """
    needed = verifier.couples_noise, vocab_size, device, *_kind_of(sampling, vocab_size)
    if isinstance(verifier, FusedVerifier) and needed not in _compiled:
        with announced("GPU", "some seconds"), on_device(device):
            verifier.compile_for(sampling, vocab_size, device)
        _compiled.add(needed)


def compile_drafting(
    speculators: Iterable[Speculator], sampling: SamplingParams, vocab_size: int, device: torch.device
) -> None:
    """Compile the GPU kernels of drafters before the first step; returns at once if all are compiled.

    Args:
        speculators: Bound and guarded speculators.
        sampling: Sampling parameters of the call.
        vocab_size: Size of the policy's vocabulary.
        device: Device of the policy.
    """
    if not kernels_run_on(device):
        return
    needed = vocab_size, device, sampling.repetition_penalty != 1, *_kind_of(sampling, vocab_size)
    for speculator in speculators:
        compiled = _compiled_of.setdefault(speculator, set())
        if needed not in compiled:
            with announced("GPU", "some seconds"), on_device(device):
                speculator.compile_for(sampling)
            compiled.add(needed)


def _kind_of(sampling: SamplingParams, vocab_size: int) -> tuple[Hashable, ...]:
    """Key that is equal for calls with the same compiled kernels."""
    temperature = kernel_temperature(sampling)
    kind: tuple[Hashable, ...] = (temperature if temperature in (0, 1) else None,)
    if not sampling.truncates:
        return kind
    top_k, top_p, min_p = sampling.top_k in range(1, vocab_size), sampling.top_p < 1, sampling.min_p > 0
    return *kind, sampling.temperature == 1, top_k, top_p, min_p


_compiled: set[tuple[Hashable, ...]] = set()  # keys of calls whose kernels are compiled
_compiled_of: WeakKeyDictionary[Speculator, set[tuple[Hashable, ...]]] = WeakKeyDictionary()  # the same per drafter


@contextmanager
def announced(kind: str, how_long: str) -> Iterator[None]:
    """Context that announces a compilation that takes long, and says how long it took."""
    began = time.perf_counter()
    saying = f"atlas_rl: compiling its {kind} kernels, once per machine: {how_long}"
    said = threading.Timer(_WORTH_SAYING_S, logger.warning, [saying])
    said.daemon = True
    said.start()
    try:
        yield
    finally:
        said.cancel()
    seconds = time.perf_counter() - began
    if seconds > _WORTH_SAYING_S:
        logger.warning("atlas_rl: compiled its %s kernels in %.0f s; they are cached for the next run", kind, seconds)


@contextmanager
def _counted() -> Iterator[None]:
    """Context with a progress bar that advances with every CPU kernel that numba compiles."""
    bar = progress.bar("CPU kernels", num_kernels()[0], "kernel", after_s=_WORTH_SAYING_S)
    with bar, event.install_listener("numba:compile", _MovesABar(bar)):
        yield


class _MovesABar(event.Listener):
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def on_start(self, event: Any) -> None:
        pass

    def on_end(self, event: Any) -> None:
        self._bar.update(num_kernels()[1] - self._bar.n)


def _run_all() -> None:
    requests = np.arange(2)
    probs = torch.full((2, BLOCK), 1 / BLOCK, dtype=torch.float32, device="cpu")
    choose(probs, request_keys(0, 2), requests, Stream.TARGET, greedy=False)
    choose_among(probs.numpy(), np.arange(BLOCK), request_keys(0, 2), requests, int(Stream.TARGET))
    truncate(torch.zeros(1, BLOCK, dtype=torch.float32, device="cpu"), Truncation(top_p=0.5))
    tokens = torch.ones(2, 1, 2, dtype=torch.float32, device="cpu")
    rms_norm(tokens, torch.ones(2, dtype=torch.float32, device="cpu"), 1e-6)
    rotate(tokens, tokens, tokens[:, 0], tokens[:, 0])
    compile_attention()
    compile_products()
    compile_gate()
    compile_layer()
    row = torch.ones(1, 2, dtype=torch.float32, device="cpu")
    add_and_norm(row, row.clone(), row[0], 1e-6, False)
    rotate_in_place(row.clone(), row.clone(), row, row, 2)
    acceptance, confidence = AcceptanceModel(), np.full((2, 2), 0.5, np.float32)
    acceptance.observe(confidence, np.full(2, 2), np.ones(2, np.int64))
    survival = acceptance.survival(confidence, np.full(2, 2))
    within(np.full(2, 4), np.full(2, 4))
    bounds(np.full(2, 4))
    best = survival.copy(), np.zeros(2), np.zeros(2, np.int64)
    take_better(*best, survival, 0, 1)
    weigh(confidence, np.full(2, 2), *acceptance.tables(), *best, 0, 1)
    table, room = np.ones(2 * MAX_LOOKAHEAD + 3), np.full(2, 4)
    depths, edges, arms = np.array([1, 2]), np.array([8]), Arms(1)
    ask_next(survival, room, arms.backlogs, table, 1.0, 0.0, 0.0, depths, edges, False, *arms.arrays)
    admitted(survival, np.sort(positive(survival)), table, 1.0, 0.0, 1.0, False)
    sequences = _toy_sequences()
    draft = Draft(np.zeros((2, 1), np.int64), np.ones(2, np.int64), np.zeros((2, 1), np.float32))
    packed_tokens(requests, sequences.token_ids, sequences.lengths, draft.token_ids, draft.lengths)
    rows = requests, sequences.lengths, sequences.noise_keys, draft.token_ids, draft.lengths
    packed = packed_positions(*rows)
    padded_tokens(4, packed[0], requests, draft.lengths + 1, requests, padded_positions(4, *rows))
    figures = np.ones(len(packed[0]), np.float32)
    unpacked(packed[1], np.ones(2, np.int64), packed[0], figures, figures, figures, sequences.sampling.stops)
    _run_rows_of_drafts(sequences, requests)
    history = GuardedSpeculator(HistorySpeculator(threads=2), Faults())
    for _ in range(2):  # the second call archives the first, and drafts in parallel
        sequences = _toy_sequences()
        history.start(sequences, requests)
        drafted = history.propose(sequences, requests, np.full(2, 4))
        controller = GuardedController(FixedController([""], "", 4), Faults())
        merge({"": drafted}, [""], controller.admit(Step(room, 16, [""], drafts={"": drafted})), 4)
        ones, figures = np.ones(2, np.int64), np.ones((2, 1), np.float32)
        settled = Settled(requests, ones[:, None], ones, 0 * ones, figures, figures, Hidden.none())
        verified = commit(settled, sequences, sequences.lengths + 1, StepRecorder())
        verified.outcome_of(drafted)
        history.observe(sequences, verified)
        history.learn()


def _run_rows_of_drafts(sequences: Sequences, requests: np.ndarray) -> None:
    lengths, ones = sequences.lengths, np.ones(2, np.int64)
    room_of(requests, lengths, lengths, needed_by(requests, lengths, lengths))
    reached(requests, ones, lengths, lengths, lengths)
    rest_of(requests, lengths, lengths, lengths)
    positions_alike(sequences.noise_keys, lengths, requests, 1)
    cut(ones[:, None], np.ones((2, 1), np.float32), ones, sequences.sampling.stops, np.zeros(0, np.bool_))
    newest_indices(requests, lengths, sequences.token_ids, np.zeros(4, np.int64))
    newest_places(requests, ones, requests, lengths)
    committed_places(requests, ones)
    bounds(ones), asked_of(ones), tokens_of(requests, lengths)


def _toy_sequences() -> Sequences:
    tokens = np.zeros((2, 16), np.int32)
    tokens[:, :8] = [1, 2, 3, 1, 2, 3, 1, 2]
    return Sequences(
        token_ids=tokens,
        lengths=np.full(2, 8),
        prompt_lengths=np.full(2, 8),
        prompt_keys=np.zeros(2, np.int64),
        noise_keys=request_keys(0, 2),
        sampling=SamplingParams(max_new_tokens=8),
        vocab_size=4,
        policy_version=0,
    )


if __name__ == "__main__":
    compile_kernels()
