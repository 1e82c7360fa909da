"""Drafts for a batch whose requests sample in several ways, each under its own sampling parameters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache

import numpy as np
import torch

from atlas_rl.controller.base import Controller, Step
from atlas_rl.core import Draft, Hidden, SamplingParams, Sequences, Verified
from atlas_rl.decode.compile_kernels import compile_drafting
from atlas_rl.decode.observing import Observing
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
        observing: Holds what speculators have not observed yet.
        table: Holds the requests' ways of sampling.
    """

    def __init__(
        self,
        speculators: Mapping[str, Speculator],
        controller: Controller,
        recorder: StepRecorder,
        observing: Observing,
        table: RequestTable,
    ) -> None:
        super().__init__(speculators, controller, recorder, observing)
        self._table = table

    def compile_for_ways(self, device: torch.device) -> None:
        """Compile drafters' kernels for requests that sample in these ways."""
        for sampling in self._table.all_ways:
            compile_drafting(self._speculators.values(), sampling, self._table.current.vocab_size, device)

    def drawn_as(self, sequences: Sequences, requests: np.ndarray) -> Hashable:
        """Rounded sampling parameters of all requests, or a marker that they differ."""
        ways = self._table.ways(requests) if self._table.only_way is None else [(self._table.only_way, requests)]
        return _roughly(ways[0][0]) if len(ways) == 1 else MIXED

    def _update(self, name: str, sequences: Sequences, requests: np.ndarray, step: Step) -> float:
        """As the base class does. The backlog is asked for again: it may depend on the latest tokens."""
        began_s = super()._update(name, sequences, requests, step)
        step.backlog[name] = self._speculators[name].backlog(sequences, requests) or 0
        return began_s

    def draft(self, name: str, sequences: Sequences, requests: np.ndarray, wanted: np.ndarray) -> Draft:
        if self._table.only_way is not None:
            self._table.sample_as(self._table.only_way)
            return super().draft(name, sequences, requests, wanted)
        parts = []
        for sampling, rows in self._table.ways(requests):
            self._table.sample_as(sampling)
            parts.append((rows, super().draft(name, sequences, requests[rows], wanted[rows])))
        return parts[0][1] if len(parts) == 1 else _together(parts, len(requests))


def observing_in_ways(speculators: Mapping[str, Speculator], table: RequestTable) -> Observing:
    """What speculators have not observed yet, of requests whose ways of sampling `table` holds."""
    return Observing(speculators, lambda speculator, verified: observe_in_ways(speculator, table, verified))


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
