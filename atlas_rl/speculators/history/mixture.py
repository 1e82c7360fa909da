"""Turns cursors into a probability, a draft token and a confidence, with weights learned online.

**Mixture.** A cursor c of category k(c) = (source, match length) predicts one token x_c with weight w_k, and

    P(x) = (1 - m) n(x) / sum_y n(y)     n(x) = sum_c w_k(c) 1[x_c = x]     m = escape mass: the token is none of these

log w_k climbs the log-likelihood of the observed tokens: its gradient is the share of category k in the weight of the
right token, minus its share in all weight. So a category whose cursors are right where others are wrong gains weight.
Where the policy branches evenly, cursors of equal reliability count as samples of the policy. The escape mass is the
running frequency of "none of these" among similar positions (best category, number of cursors, number of different
tokens), as in PPM's secondary escape estimation.

**Coupled draft.** The policy takes argmax p(x) / E(x): the first arrival of processes with times T(x) = E(x) / p(x).
E is known beforehand, so the draft is the first arrival under P(x)^g. With many counts g = 1 is right, and the draft
is the policy's own choice up to the error of P. With few counts, the likely token wins more often than P says: a rate
known from n counts is Gamma(n), whose median falls further below its mean the smaller n is. The exponent is not
assumed: every g of a grid is scored at every token, and the best for this kind of position is used (full information,
so no exploration). The draft is wrong if

 *  an unseen token arrives earlier. Unseen tokens have rate m together, and which of their noise matters is unknown:
    none arrives before time t with probability exp(-m t);
 *  another candidate arrives earlier under the true p, whose rates are Gamma(n) (`_overtakes`).

**One-hot draft** (greedy, or rejection verification): the likeliest token; its confidence depends on the prefix alone.

Confidence is a logistic regression, trained online, on this probability and on its inputs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from atlas_kernels.noise import exponential
from atlas_rl.speculators.history.match import LENGTH, MAX_CURSORS, NEXT, NUM_SOURCES, RECALLED, SOURCE
from atlas_rl.speculators.history.store import MAX_MATCH
from atlas_rl.speculators.saved_state import SavedState

COUPLED, ONE_HOT = 0, 1
"""Draft modes: the first arrival under the policy's noise, or the likeliest token."""

# Match length 0..24 -> bucket: fine where one more token of context matters most.
LENGTH_BUCKET = np.array([0, 0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 8, 8, 8, 8, 8, 8, 8, 8, 9], np.int64)
NUM_BUCKETS = 10
# A kind of position: (whether the best cursor has the same prompt, different tokens in 4 classes, cursors in
# 4 classes).
NUM_KINDS = 2 * 4 * 4
EXPONENTS = np.array([1.0, 1.5, 2.5, 5.0])
# Features of a draft token for the confidence regression; RAW is the logit of the derived probability.
BIAS, RAW, SHARE, ESCAPE, MARGIN, EVIDENCE, MATCH, COUNT = range(8)
NUM_FEATURES = 8

_WEIGHT_RATE = 0.2
_CONFIDENCE_RATE = 0.03
_MEMORY = 0.998  # decay per trial, because the policy changes
_PRIOR_TRIALS = 4.0
_MAX_MARGIN = 4.0
_NEVER = 1e30
_LEAST_ESCAPE = 1e-9


class Model(NamedTuple):
    """All learned state except the tokens themselves."""

    log_weights: np.ndarray  # float64 [NUM_SOURCES, NUM_BUCKETS]
    escapes: np.ndarray  # float64 [NUM_KINDS, NUM_BUCKETS, 2]: hits, trials
    exponents: np.ndarray  # float64 [NUM_KINDS, len(EXPONENTS)], decayed counts of hits
    confidence: np.ndarray  # float64 [2, 2, NUM_FEATURES]: per draft mode, coefficients and squared gradients


class Scratch(NamedTuple):
    """Work arrays of one position; candidates are the distinct tokens that cursors predict."""

    rates: np.ndarray  # float64 [NUM_SOURCES, NUM_BUCKETS], exponentials of the model's log weights
    weights: np.ndarray  # float64 [MAX_CURSORS], per cursor, relative to the largest
    tokens: np.ndarray  # int64 [MAX_CURSORS], candidates
    masses: np.ndarray  # float64 [MAX_CURSORS], n(x) of the candidates
    times: np.ndarray  # float64 [MAX_CURSORS], T(x)
    picks: np.ndarray  # int64 [len(EXPONENTS)], candidate that each exponent would draft
    features: np.ndarray  # float64 [NUM_FEATURES]


class Position(NamedTuple):
    """Result of `mix`."""

    different: int  # number of candidates
    total: float  # mass of all candidates
    kind: int
    bucket: int  # length bucket of the cursor with the largest weight
    escape: float  # probability that the next token is none of the candidates


def new_model() -> Model:
    """A model with prior weights: longer matches predict better, and the confidence is the derived probability."""
    log_weights = np.tile(0.5 * np.arange(NUM_BUCKETS), (NUM_SOURCES, 1))
    escapes = np.full((NUM_KINDS, NUM_BUCKETS, 2), _PRIOR_TRIALS)
    for kind in range(NUM_KINDS):
        count, different = 2.0 ** (kind % 4), min(2.0 ** (kind // 4 % 4), 2.0 ** (kind % 4))
        escapes[kind, :, 0] *= different / (count + different)
    exponents = np.zeros((NUM_KINDS, len(EXPONENTS)))
    for kind in range(NUM_KINDS):
        exponents[kind, 1 if kind % 4 == 3 else 2] += 0.5  # few counts call for a higher exponent
    confidence = np.zeros((2, 2, NUM_FEATURES))
    confidence[:, 0, RAW] = 1.0
    confidence[:, 1] = 1.0
    return Model(log_weights, escapes, exponents, confidence)


@numba.njit
def new_scratch(model):
    """New work arrays, valid for a model that only `learn` changes."""
    return Scratch(
        np.exp(model.log_weights),
        np.empty(MAX_CURSORS),
        np.empty(MAX_CURSORS, np.int64),
        np.empty(MAX_CURSORS),
        np.empty(MAX_CURSORS),
        np.empty(len(EXPONENTS), np.int64),
        np.empty(NUM_FEATURES),
    )


@numba.njit(inline="always")
def _log2_class(n):
    """Class 0, 1, 2, 3 of 1, 2..3, 4..7, more."""
    return 0 if n < 2 else (1 if n < 4 else (2 if n < 8 else 3))


@numba.njit
def mix(cursors, count, model, scratch):
    """The mixture of `count > 0` cursors: fills the candidates and their masses, returns the `Position`."""
    best = 0
    for i in range(count):
        scratch.weights[i] = scratch.rates[cursors[i, SOURCE], LENGTH_BUCKET[cursors[i, LENGTH]]]
        if scratch.weights[i] > scratch.weights[best]:
            best = i
    unit = 1 / scratch.weights[best]
    different, total = 0, 0.0
    for i in range(count):
        scratch.weights[i] *= unit
        total += scratch.weights[i]
        x = 0
        while x < different and scratch.tokens[x] != cursors[i, NEXT]:
            x += 1
        if x == different:
            scratch.tokens[x], scratch.masses[x] = cursors[i, NEXT], 0.0
            different += 1
        scratch.masses[x] += scratch.weights[i]
    group = 0 if cursors[best, SOURCE] <= RECALLED else 1
    kind = (group * 4 + _log2_class(different)) * 4 + _log2_class(count)
    bucket = LENGTH_BUCKET[cursors[best, LENGTH]]
    escape = model.escapes[kind, bucket, 0] / model.escapes[kind, bucket, 1]
    escape = min(max(escape, _LEAST_ESCAPE), 1 - _LEAST_ESCAPE)  # logarithms of it and of its complement are taken
    return Position(different, total, kind, bucket, escape)


@numba.njit(inline="always")
def _logit(p):
    p = min(max(p, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p))


@numba.njit(inline="always")
def _overtakes(n, m, log_ratio):
    """Probability that a candidate of `m` counts, later by `log_ratio` under the counts, truly precedes one of `n`.

    The log of a Gamma(n) rate has mean near log(n) - 1 / (2 n) and variance near 1 / n + 1 / (2 n**2); the difference
    of two is approximated as normal, and the normal as logistic.
    """
    shift = 0.5 / m - 0.5 / n
    spread = math.sqrt(1 / n + 0.5 / (n * n) + 1 / m + 0.5 / (m * m))
    return 1 / (1 + math.exp(min(1.702 * (log_ratio + shift) / spread, 50.0)))


@numba.njit
def _first_arrival(at, scratch, exponent):
    """The candidate that arrives first if rates are raised to `exponent`."""
    first, pick = _NEVER, 0  # a valid index even if no comparison holds
    for x in range(at.different):
        # Times scale with the rate's unit, so dividing by the mass instead of P changes no comparison.
        time = scratch.times[x] * (at.total / scratch.masses[x]) ** exponent
        if time < first:
            first, pick = time, x
    return pick


@numba.njit
def _choose_coupled(at, model, scratch, key, position, learns):
    """First arrival under the policy's own noise; returns its index and fills its features.

    With `learns`, it fills the picks of all exponents as well; drafting needs only that of the best one.
    """
    for x in range(at.different):
        scratch.times[x] = exponential(key, position, scratch.tokens[x], 0)
    most = np.argmax(model.exponents[at.kind])
    for g in range(len(EXPONENTS)):
        if learns or g == most:
            scratch.picks[g] = _first_arrival(at, scratch, EXPONENTS[g])
    best = scratch.picks[most]
    for x in range(at.different):
        scratch.times[x] *= at.total / ((1 - at.escape) * scratch.masses[x])
    times, masses = scratch.times, scratch.masses
    raw, margin = math.exp(-at.escape * times[best]), _MAX_MARGIN
    for x in range(at.different):
        if x != best:
            log_ratio = math.log(times[x] / times[best])
            margin = min(margin, log_ratio)
            raw *= 1 - _overtakes(masses[best], masses[x], log_ratio)
    scratch.features[RAW] = _logit(raw)
    scratch.features[ESCAPE] = max(math.log(at.escape * times[best]), -6.0)
    scratch.features[MARGIN] = max(margin, -_MAX_MARGIN)
    return best


@numba.njit
def _choose_likeliest(at, scratch):
    """The likeliest candidate; returns its index and fills its features."""
    masses = scratch.masses
    best, second = 0, 0.0
    for x in range(1, at.different):
        if masses[x] > masses[best]:
            best, second = x, masses[best]
        else:
            second = max(second, masses[x])
    scratch.features[RAW] = _logit((1 - at.escape) * masses[best] / at.total)
    scratch.features[ESCAPE] = _logit(at.escape)
    scratch.features[MARGIN] = _MAX_MARGIN if second == 0 else min(math.log(masses[best] / second), _MAX_MARGIN)
    return best


@numba.njit
def choose(cursors, count, at, model, scratch, mode, key, position, learns):
    """Choose the candidate to draft: returns its index, and fills confidence features and inputs of `learn`."""
    best = (
        _choose_coupled(at, model, scratch, key, position, learns)
        if mode == COUPLED
        else _choose_likeliest(at, scratch)
    )
    longest = 0
    for i in range(count):
        if cursors[i, NEXT] == scratch.tokens[best]:
            longest = max(longest, cursors[i, LENGTH])
    features = scratch.features
    features[BIAS] = 1.0
    features[SHARE] = _logit((1 - at.escape) * scratch.masses[best] / at.total)
    features[EVIDENCE] = math.log(scratch.masses[best])
    features[MATCH] = longest / MAX_MATCH
    features[COUNT] = math.log(count)
    return best


@numba.njit
def confidence_of(coefficients, features):
    """Logistic regression in (0, 1); `coefficients` is `[2, NUM_FEATURES]`."""
    logit = 0.0
    for f in range(NUM_FEATURES):
        logit += coefficients[0, f] * features[f]
    return 1 / (1 + math.exp(-min(max(logit, -7.0), 7.0)))


@numba.njit
def learn(cursors, count, token, drafted, at, model, scratch, mode):
    """Learn from the actual token, after `mix` and `choose`, which picked candidate `drafted`."""
    right = -1
    for x in range(at.different):
        if scratch.tokens[x] == token:
            right = x
    model.escapes[at.kind, at.bucket] *= _MEMORY
    model.escapes[at.kind, at.bucket, 0] += right < 0
    model.escapes[at.kind, at.bucket, 1] += 1
    _learn_confidence(model.confidence[mode], scratch.features, drafted == right)
    if right < 0 or at.different == 1:
        return
    if mode == COUPLED:
        for g in range(len(EXPONENTS)):
            hits = model.exponents[at.kind, g]
            model.exponents[at.kind, g] = hits * _MEMORY + (scratch.picks[g] == right)
    for i in range(count):
        gain = at.total / scratch.masses[right] - 1 if cursors[i, NEXT] == token else -1.0
        category = cursors[i, SOURCE], LENGTH_BUCKET[cursors[i, LENGTH]]
        model.log_weights[category] += _WEIGHT_RATE * gain * scratch.weights[i] / at.total
        scratch.rates[category] = math.exp(model.log_weights[category])


@numba.njit
def _learn_confidence(coefficients, features, hit):
    """One step of logistic regression (AdaGrad: Duchi, Hazan, Singer, JMLR 2011) on whether a draft was right."""
    error = hit - confidence_of(coefficients, features)
    for f in range(NUM_FEATURES):
        gradient = error * features[f]
        coefficients[1, f] = coefficients[1, f] * _MEMORY + gradient * gradient
        coefficients[0, f] += _CONFIDENCE_RATE * gradient / math.sqrt(coefficients[1, f] + 1e-3)


def model_state(model: Model) -> dict[str, Any]:
    """Arrays of a model by name."""
    return {name: value.copy() for name, value in model._asdict().items()}


def model_from_state(state: SavedState) -> Model:
    """Inverse of `model_state`.

    Raises:
        ValueError: Arrays have another shape, or numbers out of the range that `learn` reaches and `mix` and `choose`
            accept.
    """
    shapes = {name: value.shape for name, value in new_model()._asdict().items()}
    model = Model(**{name: state.floats(name, shapes[name], *_RANGES[name]) for name in Model._fields})
    hits, trials = model.escapes[..., 0], model.escapes[..., 1]
    if not ((hits <= trials) & (trials > 0)).all():
        raise ValueError("history index: escapes counts more hits than trials")
    if not (model.confidence[:, 1] >= 0).all():
        raise ValueError("history index: confidence has squared gradients below 0")
    return model


# Far beyond what learning reaches, but safe for the kernels' arithmetic: weights are exponentiated, counts decay.
_RANGES = {"log_weights": (-200.0, 200.0), "escapes": (0.0, 1e6), "exponents": (0.0, 1e6), "confidence": (-1e6, 1e6)}
