"""Verification as part of a step of fixed shape: the outcomes of verification behind it, on a CPU."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl.controller.fixed import FixedController
from atlas_rl.decode import generate as generating
from atlas_rl.policy import step_graphs
from atlas_rl.policy.base import Segments
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.step_tail import StepTail
from atlas_rl.sampling.by_kernels import FusedVerifier
from atlas_rl.sampling.verification import VERIFIERS
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.engines import VOCAB, draft_model, engine_of, generate, parrot
from tests.models import tiny_llama


class Noting(FusedVerifier):
    """By the kernels' references; notes every outcome, and for which steps verification was asked for and ran."""

    def __init__(self, form: Any, joins: bool, notes: list[Any]) -> None:
        super().__init__(form, "reference")
        self._may_join, self._notes = joins, notes

    def tail(self, *arguments: Any) -> StepTail | None:
        return super().tail(*arguments) if self._may_join else None

    def begin(self, logits: Any, draft: Any, sequences: Any, requests: Any, tail: Any = None) -> Any:
        begun = super().begin(logits, draft, sequences, requests, tail)
        finish = begun.finish

        def noted() -> Any:
            outcome = finish()
            self._notes.append((outcome, tail is not None, tail is not None and tail.result is not None))
            return outcome

        begun.finish = noted
        return begun


def run(form: str, make: Any, monkeypatch: pytest.MonkeyPatch, *, joins: bool, **options: Any) -> tuple[Any, list[Any]]:
    notes: list[Any] = []
    engine = make(form)
    with monkeypatch.context() as patches:
        patches.setattr(generating, "verifier_on", lambda device, given: Noting(VERIFIERS[form](), joins, notes))
        return generate(engine, **options), notes


ARMS = {
    "plain": lambda form: engine_of(speculation=False, verification=form),
    "parrot": lambda form: with_form(parrot(0.3), 5, form),
    "history": lambda form: with_form(HistorySpeculator(), 3, form),
    "draft LM": lambda form: with_form(DraftLM(draft_model(), VOCAB), 3, form),
}


def with_form(speculator: Any, k: int, form: str) -> Any:
    controller = FixedController([speculator.name], speculator.name, k)
    return engine_of(speculators=[speculator], controller=controller, verification=form)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("form", VERIFIERS)
def test_outcomes_are_those_of_verification_behind_the_step(
    form: str, arm: str, temperature: float, fixed_shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"temperature": temperature, "max_new_tokens": 12}
    output, queued = run(form, ARMS[arm], monkeypatch, joins=True, **options)
    expected, behind = run(form, ARMS[arm], monkeypatch, joins=False, **options)
    ran = [each for *_, each in queued]
    if arm == "draft LM" and form == "rejection" and temperature:
        assert not any(ran)  # its probabilities have a shape of their own
    else:
        assert ran == [False] + [True] * (len(ran) - 1)  # the first tokens are drawn from prompts
    assert output.completion_ids == expected.completion_ids
    assert output.logprobs == expected.logprobs
    assert output.report.accepted == expected.report.accepted
    for (own, *_), (other, *_) in zip(queued, behind, strict=True):
        for each in fields(own):
            np.testing.assert_array_equal(getattr(own, each.name), getattr(other, each.name))


@pytest.mark.parametrize("options", [{"top_k": 5}, {"repetition_penalty": 1.3}])
def test_what_is_processed_first_is_verified_behind_the_step(
    options: dict[str, Any], fixed_shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, notes = run("invariant", ARMS["history"], monkeypatch, joins=True, **options)
    assert not any(asked for _, asked, _ in notes)
    assert any(cache.steps is not None and cache.steps._steps for cache in fixed_shapes)


def test_there_are_no_more_shapes_than_without(fixed_shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number bounds tokens and requests. Batches drain here, by endings and by limits."""
    sizes = []
    for joins in (True, False):
        fixed_shapes.clear()
        run("invariant", ARMS["parrot"], monkeypatch, joins=joins)
        sizes.append([size for cache in fixed_shapes if cache.steps is not None for size, *_ in cache.steps._steps])
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) > 1


def test_probabilities_end_it_for_the_call(fixed_shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every size would be captured with verification and without."""
    lm = DraftLM(draft_model(), VOCAB)
    own, turns = lm.propose, []

    def propose(sequences: Any, requests: Any, wanted: Any) -> Any:
        turns.append(None)
        return own(sequences, requests, wanted if len(turns) == 3 else 0 * wanted)

    monkeypatch.setattr(lm, "propose", propose)
    _, notes = run("rejection", lambda form: with_form(lm, 3, form), monkeypatch, joins=True)
    assert len(notes) > 6
    assert [ran for *_, ran in notes] == [False, True, True] + [False] * (len(notes) - 3)


class Doubling(StepTail):
    """Twice the logits of every token, and its inputs."""

    key = "doubling"

    def __init__(self, number: int) -> None:
        self._number = number

    def inputs(self, size: int) -> np.ndarray:
        return np.full(size, self._number)

    def run(self, logits: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * logits[:, 0] + inputs


def test_steps_too_large_for_a_shape_leave_the_tail_undone() -> None:
    runner = InProcessRunner(tiny_llama(layers=1, seed=3, context=2048))
    cache, results = runner.new_cache(2, 2048), []
    cache.varlen = True
    one = np.ones(1, np.int64)
    with runner.session(cache):
        runner.forward(Segments(one, 0, 0 * one, one), np.arange(1))
        for count in (step_graphs.SIZES[-1], step_graphs.SIZES[-1] + 1, 3):
            tail = Doubling(count)
            tokens = np.arange(count) % 64
            logits = runner.forward(Segments(tokens, 0, one, count * one), np.arange(count), tail=tail)
            results.append((tail.result, logits[:, 0].clone()))
    (whole, logits), (too_large, _), (few, first) = results
    assert too_large is None
    assert torch.equal(whole, 2 * logits + len(logits))
    assert len(few) == 4 or len(few) == step_graphs.SIZES[-1]
    assert torch.equal(few[:3], 2 * first + 3)
