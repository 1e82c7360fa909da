"""Drafts for a batch whose requests sample in several ways, each under its own sampling parameters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache

import numpy as np
import torch

from atlas_rl.controller.base import Controller, Step
from atlas_rl.core import Draft, Hidden, SamplingParams, Sequences, Verified
from atlas_rl.decode.compile_kernels import compile_drafting
from atlas_rl.decode.propose import Proposing
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.speculators.base import Speculator
from atlas_rl.vllm.request_table import RequestTable

MIXED = "mixed"


class ProposingInWays(Proposing):
    """Asks a drafter once for every way of sampling in the batch; the controller sees one draft of all requests.

    Args:
        speculators: Speculators by name, in the controller's order.
        controller: Plans drafts.
        recorder: Gets the seconds.
        table: Holds the requests' ways of sampling.
        observing: Holds what speculators have not observed yet.
    """

    def __init__(
        self,
        speculators: Mapping[str, Speculator],
        controller: Controller,
        recorder: StepRecorder,
        table: RequestTable,
        observing: Observing,
    ) -> None:
        super().__init__(speculators, controller, recorder)
        self._table, self._observing = table, observing

    def compile_for_ways(self, device: torch.device) -> None:
        """Compile drafters' kernels for requests that sample in these ways."""
        for sampling in self._table.all_ways:
            compile_drafting(self._speculators.values(), sampling, self._table.current.vocab_size, device)

    def drawn_as(self, sequences: Sequences, requests: np.ndarray) -> Hashable:
        """Rounded sampling parameters of all requests, or a marker that they differ."""
        ways = self._table.ways(requests) if self._table.only_way is None else [(self._table.only_way, requests)]
        return _roughly(ways[0][0]) if len(ways) == 1 else MIXED

    def ask(self, name: str, sequences: Sequences, requests: np.ndarray, wanted: np.ndarray, step: Step) -> None:
        """Ask as the base class does, but first show the drafter the latest tokens; its drafts are not charged for that."""
        with self._recorder.time("observe"):
            self._observing.hand_over(name)
        step.backlog[name] = self._speculators[name].backlog(sequences, requests) or 0
        super().ask(name, sequences, requests, wanted, step)

    def draft(self, name: str, sequences: Sequences, requests: np.ndarray, wanted: np.ndarray) -> Draft:
        if self._table.only_way is not None:
            self._table.sample_as(self._table.only_way)
            return super().draft(name, sequences, requests, wanted)
        parts = []
        for sampling, rows in self._table.ways(requests):
            self._table.sample_as(sampling)
            parts.append((rows, super().draft(name, sequences, requests[rows], wanted[rows])))
        return parts[0][1] if len(parts) == 1 else _together(parts, len(requests))


class Observing:
    """Passes settled tokens to speculators: before they draft next, else while the next forward runs.

    A step in which no speculator is asked does not need the observation, and would keep the device waiting for it.

    Args:
        speculators: Speculators by name.
        table: Holds the requests' ways of sampling.
    """

    def __init__(self, speculators: Mapping[str, Speculator], table: RequestTable) -> None:
        self._speculators, self._table = speculators, table
        self._waiting: dict[str, Verified] = {}

    @property
    def waits(self) -> bool:
        """Whether some speculator has not observed the latest forward."""
        return bool(self._waiting)

    def put_off(self, verified: Verified) -> None:
        """Keep the outcome of a forward for later; the outcome of the previous one has been passed on."""
        self._waiting = dict.fromkeys(self._speculators, verified)

    def hand_over(self, name: str) -> None:
        """Pass the outcome to one speculator, which is asked next."""
        verified = self._waiting.pop(name, None)
        if verified is not None:
            observe_in_ways(self._speculators[name], self._table, verified)

    def hand_over_all(self) -> None:
        """Pass the outcome to all: the device runs the next forward, or requests are about to change."""
        for name in tuple(self._waiting):
            self.hand_over(name)

    def drop(self) -> None:
        """Drop the outcome; it is unreliable."""
        self._waiting = {}


def observe_in_ways(speculator: Speculator, table: RequestTable, verified: Verified) -> None:
    """Pass verified tokens to a drafter, greedy and drawn requests apart: some drafters learn differently from each."""
    if table.only_way is not None:
        table.sample_as(table.only_way)
        speculator.observe(table.current, verified)
        return
    kinds: dict[bool, list[tuple[SamplingParams, np.ndarray]]] = {}
    for sampling, rows in table.ways(verified.requests):
        kinds.setdefault(sampling.greedy, []).append((sampling, rows))
    for ways in kinds.values():
        table.sample_as(ways[0][0])
        rows = np.concatenate([rows for _, rows in ways])
        speculator.observe(table.current, verified if len(kinds) == 1 else _of(verified, rows))


def _of(verified: Verified, rows: np.ndarray) -> Verified:
    hidden = verified.hidden
    return Verified(
        verified.requests[rows],
        verified.token_ids[rows],
        verified.num_committed[rows],
        verified.num_accepted[rows],
        verified.num_drafted[rows],
        verified.finished[rows],
        Hidden(hidden.starts[rows] if len(hidden.starts) else hidden.starts, hidden.head_inputs, hidden.layers),
    )


def _together(parts: list[tuple[np.ndarray, Draft]], batch: int) -> Draft:
    """Merge drafts of disjoint rows into one of `batch` rows; drafts with coupled noise carry no probabilities."""
    width = max(draft.token_ids.shape[1] for _, draft in parts)
    tokens, lengths = np.zeros((batch, width), np.int64), np.zeros(batch, np.int64)
    confidence = np.full((batch, width), 0.5, np.float32)
    for rows, draft in parts:
        assert draft.draft_probs is None, "vLLM's drafters couple noise"
        own = draft.token_ids.shape[1]
        tokens[rows, :own], lengths[rows], confidence[rows, :own] = draft.token_ids, draft.lengths, draft.confidence
    return Draft(tokens, lengths, confidence)


@lru_cache(maxsize=64)
def _roughly(sampling: SamplingParams) -> Hashable:
    """Rounded sampling parameters, so that similar distributions share statistics: clients send any number."""
    return (
        round(sampling.temperature, 1),
        min(sampling.top_k, 1000).bit_length(),
        round(sampling.top_p, 1),
        round(sampling.repetition_penalty, 1),
    )
