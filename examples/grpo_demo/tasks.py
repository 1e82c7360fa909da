"""Arithmetic tasks of the GRPO demo: prompts, written solutions and the reward.

There are three reasoning-gym families with small numbers. Each task takes a few steps in words. `write_solution` writes
solutions that are right by construction, and draws the phrasing of each sentence. A policy that is trained on them learns
the steps and keeps several ways of saying each, so its entropy stays in the range of real RL policies.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import reasoning_gym
from datasets import Dataset
from reasoning_gym.arithmetic.leg_counting import ANIMALS

Split = Literal["warm_start", "train", "eval"]

SYSTEM_PROMPT = "Think step by step, then end with 'Answer: <number>'."
_ANSWER = re.compile(r"Answer:[ \t]*([^\n]*)")

# The settings are part of the task: changing them changes what the shipped warm start was trained for.
FAMILIES: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 5, "min_digits": 1, "max_digits": 2},
    "leg_counting": {"min_animals": 1, "max_animals": 4, "min_instances": 1, "max_instances": 9},
    "products": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1},
}

# A question's checksum decides its split, so splits are disjoint for any seeds.
_SPLIT_BUCKETS: dict[str, range] = {"warm_start": range(0, 45), "train": range(45, 85), "eval": range(85, 100)}
_STREAM_SIZE = 10_000_000
_SEED_STRIDE = 100_003


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question with the data needed to score an answer."""

    family: str
    question: str
    answer: str
    metadata: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversational prompt."""
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": self.question.strip()}]


def split_of(question: str) -> str:
    """Return the only split that a question may appear in."""
    bucket = zlib.crc32(question.encode()) % 100
    return next(name for name, buckets in _SPLIT_BUCKETS.items() if bucket in buckets)


def make_tasks(split: Split, size: int, seed: int = 0, families: Sequence[str] = tuple(FAMILIES)) -> list[Task]:
    """Make `size` tasks of a split, the families in turn. The same arguments give the same tasks.

    Raises:
        ValueError: unknown split or family, or a size below 1.
    """
    if split not in _SPLIT_BUCKETS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(_SPLIT_BUCKETS)}")
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown or not families:
        raise ValueError(f"unknown task families {unknown}: choose from {', '.join(FAMILIES)}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    streams = [_stream(family, split, seed) for family in families]
    return [next(streams[index % len(streams)]) for index in range(size)]


def _stream(family: str, split: str, seed: int):
    source = reasoning_gym.create_dataset(family, size=_STREAM_SIZE, seed=seed * _SEED_STRIDE, **FAMILIES[family])
    for index in range(_STREAM_SIZE):
        entry = source[index]
        if split_of(entry["question"]) == split:
            yield Task(family=family, question=entry["question"], answer=entry["answer"], metadata=entry["metadata"])


def build_dataset(split: Split, size: int, seed: int = 0, families: Sequence[str] = tuple(FAMILIES)) -> Dataset:
    """Make a TRL data set with the columns `prompt` (messages), `family` and `answer`."""
    tasks = make_tasks(split, size, seed, families)
    return Dataset.from_list([{"prompt": t.messages, "family": t.family, "answer": t.answer} for t in tasks])


# --- scoring ---------------------------------------------------------------------------------------------------------

_SCORERS: dict[str, Any] = {}


def extract_answer(text: str) -> str | None:
    """Return the text after the last `Answer:`, or None without that marker."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None


def score(text: str, family: str, answer: str) -> float:
    """Return 1.0 if reasoning-gym scores the marked answer as right, else 0.0.

    reasoning-gym also gives a fraction if the answer merely contains the right digits. That fraction is dropped: a policy
    could collect it by listing numbers.
    """
    if family not in _SCORERS:
        _SCORERS[family] = reasoning_gym.create_dataset(family, size=1, seed=0, **FAMILIES[family])
    given = extract_answer(text)
    return float(given is not None and _SCORERS[family].score_answer(given, {"answer": answer}) >= 1.0)


def reward_func(completions: Sequence[Any], family: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Reward completions as TRL asks for it; `family` and `answer` are the data set's columns."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [score(*row) for row in zip(texts, family, answer, strict=True)]


# --- written solutions -----------------------------------------------------------------------------------------------

_OPENINGS = (
    "Let me work this out step by step.",
    "I will go through it one part at a time.",
    "We can take this from left to right.",
    "Let's solve this carefully.",
    "Okay, here is the calculation.",
    "",
    "",
    "",
)
_CLOSINGS = (
    "So the result is {r}.",
    "That gives a total of {r}.",
    "Therefore we end up with {r}.",
    "This makes {r} altogether.",
    "The final value is {r}.",
    "",
    "",
    "",
)
_FIRST = ("First, ", "To begin, ", "To start, ", "Step one: ", "Here ", "")
_NEXT = ("Then ", "Next, ", "After that, ", "Now ", "So ", "And ", "")
_ADD = (
    "{a} + {b} = {r}.",
    "{a} plus {b} is {r}.",
    "{a} + {b} gives {r}.",
    "adding {b} to {a} makes {r}.",
    "{a} and {b} more is {r}.",
)
_SUBTRACT = (
    "{a} - {b} = {r}.",
    "{a} minus {b} is {r}.",
    "{a} - {b} gives {r}.",
    "taking {b} from {a} leaves {r}.",
    "{a} less {b} is {r}.",
)
_MULTIPLY = (
    "{a} * {b} = {r}.",
    "{a} times {b} is {r}.",
    "{a} * {b} gives {r}.",
    "multiplying {a} by {b} makes {r}.",
    "{b} times {a} is {r}.",
)
_SPLIT = (
    "{t} * {b} = {tp} and {o} * {b} = {op}, so {a} * {b} = {r}.",
    "{a} is {t} + {o}, and {tp} + {op} = {r}.",
    "{b} times {t} is {tp}, {b} times {o} is {op}, together {r}.",
    "splitting {a} gives {tp} + {op} = {r}.",
)
_LEGS = (
    "{n} {name} with {k} legs each: {n} * {k} = {p}.",
    "{n} {name} have {n} * {k} = {p} legs.",
    "each {one} has {k} legs, so {n} of them have {p}.",
    "the {name} have {k} legs each, so that is {p} legs.",
    "for the {name} we count {n} times {k}, which is {p}.",
)
_TOTAL = (
    "Total: {a} + {b} = {r}.",
    "Adding up, {a} + {b} = {r}.",
    "That makes {r} so far.",
    "The sum is now {r}.",
    "Together with {a}, we have {r}.",
)


def write_solution(task: Task, rng: random.Random) -> str:
    """Write a correct solution of `task` in randomly chosen words, with the answer in the last line."""
    steps = _WRITERS[task.family](task, rng)
    closing = rng.choice(_CLOSINGS).format(r=task.answer)
    body = " ".join(part for part in (rng.choice(_OPENINGS), *steps, closing) if part)
    return f"{body}\nAnswer: {task.answer}"


def _sentence(first: bool, templates: Sequence[str], rng: random.Random, **values: Any) -> str:
    lead = rng.choice(_FIRST if first else _NEXT)
    text = rng.choice(templates).format(**values)
    return lead + text if lead else text[0].upper() + text[1:]


def _write_chain_sum(task: Task, rng: random.Random) -> list[str]:
    parts = task.metadata["expression"].split()
    total, steps = int(parts[0]), []
    for operator, term in zip(parts[1::2], map(int, parts[2::2]), strict=True):
        result = total + term if operator == "+" else total - term
        templates = _ADD if operator == "+" else _SUBTRACT
        steps.append(_sentence(not steps, templates, rng, a=total, b=term, r=result))
        total = result
    return steps


def _write_products(task: Task, rng: random.Random) -> list[str]:
    factors = [int(part) for part in task.metadata["expression"].split() if part != "*"]
    total, steps = factors[0], []
    for factor in factors[1:]:
        result = total * factor
        values: dict[str, int] = {"a": total, "b": factor, "r": result}
        tens, ones = total - total % 10, total % 10
        # Splitting a number helps only if both parts are factors to multiply.
        if tens and ones and factor > 1:
            values |= {"t": tens, "o": ones, "tp": tens * factor, "op": ones * factor}
            steps.append(_sentence(not steps, _SPLIT, rng, **values))
        else:
            steps.append(_sentence(not steps, _MULTIPLY, rng, **values))
        total = result
    return steps


def _write_leg_counting(task: Task, rng: random.Random) -> list[str]:
    total, steps = 0, []
    for name, count in task.metadata["animals"].items():
        legs = ANIMALS[name]
        product = count * legs
        plural = f"{name}s" if count > 1 else name
        steps.append(_sentence(not steps, _LEGS, rng, n=count, name=plural, one=name, k=legs, p=product))
        if len(steps) > 1:
            steps.append(rng.choice(_TOTAL).format(a=total, b=product, r=total + product))
        total += product
    return steps


_WRITERS: dict[str, Callable[[Task, random.Random], list[str]]] = {
    "chain_sum": _write_chain_sum,
    "products": _write_products,
    "leg_counting": _write_leg_counting,
}


def describe(rows: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the mean of every family's values; empty families are left out."""
    return {family: sum(values) / len(values) for family, values in rows.items() if values}
