"""Generation calls of a history index without an engine: known rollouts, decoded step by step.

Every case is seeded and deterministic. Acceptance thresholds sit far from both the expected value and the failure they
guard against; the margins are stated where they are used.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from atlas_kernels.noise import exponential, request_keys
from atlas_rl.core import Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.speculators.history.speculator import HistorySpeculator

EOS = 1


def speculator(*, coupled, **options):
    """A speculator that draws with the policy's noise, or one that drafts the likeliest token."""
    spec = HistorySpeculator(**options)
    spec.bind(
        SimpleNamespace(vocab_size=2**20, device=torch.device("cpu")), couples_noise=coupled
    )  # all that it reads of a policy
    return spec


def one_hot(**options):
    """A speculator that drafts the likeliest token: what it finds does not depend on a draw."""
    return speculator(coupled=False, **options)


def call(prompts, *, keys=None, seed=0, capacity=256, temperature=1.0):
    """A generation call whose requests stand at the end of their prompts."""
    lengths = np.array([len(p) for p in prompts], np.int64)
    tokens = np.full((len(prompts), capacity), 77_777, np.int32)  # garbage past the length must not matter
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    sampling = SamplingParams(max_new_tokens=capacity, temperature=temperature, eos_token_ids=(EOS,))
    keys = np.array([hash(tuple(p)) for p in prompts] if keys is None else keys, np.int64)
    return Sequences(
        tokens, lengths.copy(), lengths.copy(), keys, request_keys(seed, len(prompts)), sampling, 50_000, 0
    )


def commit(spec, sequences, rows, *, finished=False, num_accepted=0, num_drafted=0):
    """Append `rows` (request -> tokens) and let the speculator observe it."""
    requests = np.array(list(rows), np.int64)
    longest = max(len(tokens) for tokens in rows.values())
    ids = np.zeros((len(rows), longest), np.int64)
    for i, (request, tokens) in enumerate(rows.items()):
        begin = sequences.lengths[request]
        ids[i, : len(tokens)] = tokens
        sequences.token_ids[request, begin : begin + len(tokens)] = tokens
        sequences.lengths[request] += len(tokens)
    counts = np.array([len(tokens) for tokens in rows.values()], np.int64)
    zeros = np.zeros(len(rows), np.int64)
    done = np.full(len(rows), finished)
    spec.observe(sequences, Verified(requests, ids, counts, zeros + num_accepted, zeros + num_drafted, done))


def draft(spec, sequences, request, most):
    """Tokens drafted for one request."""
    result = spec.propose(sequences, np.array([request]), np.array([most]))
    return result.token_ids[0, : result.lengths[0]].tolist()


def archive(spec, prompt, completions, **options):
    """One finished call: `completions` of `prompt`, one after the other."""
    sequences = call([prompt] * len(completions), **options)
    spec.start(sequences, np.arange(len(completions)))
    for request, completion in enumerate(completions):
        commit(spec, sequences, {request: completion}, finished=True)
    spec.refresh(Rollouts(sequences), 1)


def decode(spec, sequences, completions, most=8):
    """Decode known completions; returns tokens per step, and per verified draft position (confidence, accepted)."""
    requests = np.arange(len(completions))
    ends = sequences.prompt_lengths + [len(c) for c in completions]
    spec.start(sequences, requests)
    steps, outcomes = 0, []
    while len(requests):
        result = spec.propose(sequences, requests, np.minimum(most, ends[requests] - sequences.lengths[requests] - 1))
        rows = {}
        for i, request in enumerate(requests):
            truth = completions[request][sequences.lengths[request] - sequences.prompt_lengths[request] :]
            accepted = 0
            for j in range(result.lengths[i]):
                outcomes.append((float(result.confidence[i, j]), bool(result.token_ids[i, j] == truth[j])))
                if not outcomes[-1][1]:
                    break
                accepted += 1
            rows[int(request)] = truth[: accepted + 1]
        steps += len(requests)
        over = [r for r, tokens in rows.items() if sequences.lengths[r] + len(tokens) == ends[r]]
        for finished in (False, True):
            group = {r: tokens for r, tokens in rows.items() if (r in over) == finished}
            if group:
                commit(spec, sequences, group, finished=finished)
        requests = np.array([r for r in requests if r not in over], np.int64)
    return sum(len(c) for c in completions) / steps, outcomes


class Branching:
    """A policy that chooses uniformly among four phrasings at every node, with the noise of its request."""

    def __init__(self, seed, nodes=12):
        rng = np.random.default_rng(seed)
        self.prompt = rng.integers(20_000, 30_000, 10).tolist()
        self.phrases = rng.integers(10, 20_000, (nodes, 4, 4)).tolist()

    def complete(self, key):
        tokens = []
        for phrases in self.phrases:
            at = len(self.prompt) + len(tokens)
            tokens += min(phrases, key=lambda p: exponential(key, at, p[0], 0))
        return [*tokens, EOS]

    def branch_points(self):
        return [i * len(self.phrases[0][0]) for i in range(len(self.phrases))]


def run_epochs(sources, epochs, *, coupled=True):
    """Decode `epochs` calls of all sources; returns the speculator and per epoch what `decode` returned."""
    spec = speculator(coupled=coupled, max_tokens=100_000)
    results = []
    for epoch in range(epochs):
        members = [s for s in sources for _ in range(6)]
        sequences = call([s.prompt for s in members], seed=100 + epoch)
        completions = [s.complete(key) for s, key in zip(members, sequences.noise_keys, strict=True)]
        results.append(decode(spec, sequences, completions))
        spec.refresh(Rollouts(sequences), epoch + 1)
    return spec, results
