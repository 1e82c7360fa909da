"""A drafter or controller that fails costs drafts: tokens stay right, and the fault is said once, counted, and then over."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch

from atlas_rl.controller.base import Admission
from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Draft
from atlas_rl.decode.guard import GuardedSpeculator
from atlas_rl.speculators.base import NO_PROMPTS
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.saved_state import NOT_SAVED
from tests.drafters import RandomDrafter
from tests.engines import VOCAB, draft_model, engine_of, generate, policy, reference, state_of

METHODS = ["start", "backlog", "propose", "observe", "refresh", "weights", "state_dict"]


class Failing(RandomDrafter):
    """Raises in one of its methods, from the nth call of it on, until it is mended."""

    name = "failing"

    def __init__(self, where, *, after=0, error=None):
        super().__init__()
        self.where, self.after, self.error = where, after, error or RuntimeError("boom")
        self.calls = dict.fromkeys(METHODS, 0)

    def _tick(self, where):
        self.calls[where] += 1
        if where == self.where and self.calls[where] > self.after:
            raise self.error

    def start(self, sequences, requests, prompts=NO_PROMPTS, cache=None):
        self._tick("start")

    def backlog(self, sequences, requests):
        self._tick("backlog")
        return 0

    def propose(self, sequences, requests, max_draft_tokens):
        self._tick("propose")
        return super().propose(sequences, requests, max_draft_tokens)

    def observe(self, sequences, verified):
        self._tick("observe")

    def refresh(self, rollouts, policy_version):
        self._tick("refresh")
        return None

    def weights(self):
        self._tick("weights")
        yield torch.zeros(1)

    def state_dict(self):
        self._tick("state_dict")
        return {"one": 1}

    def load_state_dict(self, state):
        """Nothing to restore."""


def engine_with(*speculators):
    """An engine that always asks the first of its speculators for three tokens."""
    names = [speculator.name for speculator in speculators]
    return engine_of(speculators=list(speculators), controller=FixedController(names, names[0], 3))


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("where", ["start", "backlog", "propose", "observe"])
def test_an_error_while_generating_costs_drafts_and_is_said_once(where, after, caplog):
    model = policy()
    before = state_of(model)
    drafter = Failing(where, after=0 if where == "start" else after)
    engine = engine_with(drafter, HistorySpeculator(), DraftLM(draft_model(), VOCAB))
    with caplog.at_level(logging.ERROR):
        output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    assert output.report.drafter_faults == {"failing": 1}
    assert [w for w in output.report.warnings if f"failing: {where}() raised RuntimeError: boom" in w]
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [drafter.error]
    assert state_of(model) == before
    calls = dict(drafter.calls)
    again = generate(engine)  # it is off
    assert again.completion_ids == reference().completion_ids
    assert again.report.drafter_faults == {}
    assert again.report.warnings == ()
    assert drafter.calls == calls
    drafter.where = None  # mended, and asked again from the next policy update on
    engine.policy_updated()
    mended = generate(engine)
    assert mended.completion_ids == reference().completion_ids
    assert mended.report.drafted["failing"] > 0
    assert mended.report.drafter_faults == {}


@pytest.mark.parametrize("where", ["refresh", "weights", "state_dict"])
def test_an_error_between_calls_is_in_the_next_report(where):
    drafter = Failing(where)
    engine = engine_with(drafter, HistorySpeculator())
    generate(engine)
    if where == "refresh":
        engine.policy_updated()
    elif where == "state_dict":
        state = engine.state_dict()
        assert state.keys() == {"failing", "history"}
        assert state["failing"] == NOT_SAVED
    else:
        assert list(engine._speculators["failing"].weights()) == []
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    assert output.report.drafter_faults == {"failing": 1}
    assert output.report.drafted["failing"] == 0
    drafter.where = None
    engine.policy_updated()
    assert generate(engine).report.drafted["failing"] > 0


def test_a_drafter_that_is_off_is_saved():
    """The next policy update, which switches it on again, may come after the checkpoint."""
    drafter = Failing("propose")
    engine = engine_with(drafter, HistorySpeculator())
    assert generate(engine).report.drafter_faults == {"failing": 1}
    assert engine.state_dict()["failing"] == {"one": 1}
    assert generate(engine).report.drafted["failing"] == 0, "it is off still"


def test_what_could_not_be_saved_is_said_at_saving_and_at_loading(tmp_path, caplog):
    engine = engine_with(Failing("state_dict"), HistorySpeculator())
    generate(engine)
    with caplog.at_level(logging.WARNING):
        engine.save_drafters(tmp_path / "saved")
    assert "nothing of the drafter 'failing' is saved" in caplog.text
    caplog.clear()
    resumed = engine_with(Failing(None), HistorySpeculator())
    with caplog.at_level(logging.WARNING):
        resumed.load_drafters(tmp_path / "saved")
    assert "the drafter 'failing' is ignored: its state_dict() raised" in caplog.text
    assert resumed._speculators["history"].num_archived_tokens == engine._speculators["history"].num_archived_tokens > 0
    with pytest.raises(ValueError, match="has nothing of it"):
        resumed.load_state_dict(engine.state_dict())


def test_bind_is_not_guarded():
    class Unbound(RandomDrafter):
        def bind(self, policy, couples_noise):
            raise ValueError("another policy")

    with pytest.raises(ValueError, match="another policy"):
        engine_of(speculators=[Unbound()])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=["interrupt", "exit"])
def test_interrupts_and_exits_pass(error):
    engine = engine_with(Failing("propose", error=error))
    with pytest.raises(type(error)):
        generate(engine)
    assert engine.reports == []


def test_errors_of_the_policy_itself_pass(monkeypatch):
    engine = engine_with(RandomDrafter())

    def forward(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(engine._backend.runner, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        generate(engine)


IMPOSSIBLE = {
    "a token past the vocabulary": lambda d: Draft(d.token_ids + VOCAB, d.lengths, d.confidence),
    "a negative token": lambda d: Draft(d.token_ids - VOCAB, d.lengths, d.confidence),
    "tokens that are no integers": lambda d: Draft(d.token_ids.astype(float), d.lengths, d.confidence),
    "a row too many": lambda d: Draft(np.repeat(d.token_ids, 2, 0), d.lengths, d.confidence),
    "one dimension": lambda d: Draft(d.token_ids[0], d.lengths, d.confidence),
    "lengths above what was asked for": lambda d: Draft(
        np.pad(d.token_ids, ((0, 0), (0, 9))), d.lengths + 9, np.pad(d.confidence, ((0, 0), (0, 9)))
    ),
    "lengths above its width": lambda d: Draft(d.token_ids[:, :1], d.lengths, d.confidence[:, :1]),
    "negative lengths": lambda d: Draft(d.token_ids, -d.lengths, d.confidence),
    "lengths of other requests": lambda d: Draft(d.token_ids, d.lengths[:1].repeat(99), d.confidence),
    "no confidence": lambda d: Draft(d.token_ids, d.lengths, d.confidence[:, :0]),
    "confidence that is NaN": lambda d: Draft(d.token_ids, d.lengths, d.confidence * np.nan),
    "probabilities of another vocabulary": lambda d: Draft(
        d.token_ids, d.lengths, d.confidence, torch.ones(*d.token_ids.shape, 2)
    ),
    "probabilities that are NaN": lambda d: Draft(
        d.token_ids, d.lengths, d.confidence, torch.full((*d.token_ids.shape, VOCAB), torch.nan)
    ),
    "None": lambda d: None,
    "tensors": lambda d: Draft(torch.from_numpy(d.token_ids), d.lengths, d.confidence),
}


@pytest.mark.parametrize("wrong", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_a_draft_that_cannot_be_is_a_fault(wrong):
    class Wrong(RandomDrafter):
        def propose(self, sequences, requests, max_draft_tokens):
            return wrong(super().propose(sequences, requests, max_draft_tokens))

    output = generate(engine_with(Wrong()))
    assert output.completion_ids == reference().completion_ids
    assert output.report.drafter_faults == {"random": 1}
    assert output.report.drafted["random"] == 0


@pytest.mark.parametrize("backlog", ["abc", -1, np.nan, 1.5])
def test_a_backlog_that_cannot_be_is_a_fault(backlog):
    class Wrong(RandomDrafter):
        def backlog(self, sequences, requests):
            return backlog

    output = generate(engine_with(Wrong()))
    assert output.completion_ids == reference().completion_ids
    assert output.report.drafter_faults == {"random": 1}


@pytest.mark.parametrize("survival", [np.array([np.nan]), np.array([1.5]), np.zeros((2, 2)), "abc"], ids=str)
def test_what_a_refresh_measured_must_be_probabilities(survival):
    class Wrong(RandomDrafter):
        def refresh(self, rollouts, policy_version):
            return survival

    engine = engine_of(speculators=[Wrong()])
    generate(engine)
    engine.policy_updated()
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    assert output.report.drafter_faults == {"random": 1}


class Unplanned(GoodputController):
    """Fails, or returns nonsense, in one of its methods."""

    def __init__(self, names, where, result=None):
        super().__init__(names)
        self.where, self.result, self.mended = where, result, False

    def _or_fail(self, where, call):
        if where != self.where or self.mended:
            return call()
        if self.result is None:
            raise RuntimeError("boom")
        return self.result(call())

    def plan(self, step):
        return self._or_fail("plan", lambda: super(Unplanned, self).plan(step))

    def admit(self, step):
        return self._or_fail("admit", lambda: super(Unplanned, self).admit(step))

    def observe(self, *given):
        return self._or_fail("observe", lambda: super(Unplanned, self).observe(*given))

    def policy_updated(self, expected):
        return self._or_fail("policy_updated", lambda: super(Unplanned, self).policy_updated(expected))

    def plain_forward_s(self, batch, context_tokens):
        return self._or_fail("plain_forward_s", lambda: super(Unplanned, self).plain_forward_s(batch, context_tokens))

    def take_calibration(self):
        return self._or_fail("take_calibration", super().take_calibration)


NONSENSE = {
    "asks nobody that it has": ("plan", lambda plan: {"nobody": np.ones(3, np.int64)}),
    "asks without end": ("plan", lambda plan: {"history": np.zeros(1, np.int64)}),
    "admits what is not there": ("admit", lambda a: Admission(a.drafters, a.lengths + 5)),
    "admits other requests": ("admit", lambda a: Admission(a.drafters[:0], a.lengths[:0])),
}


@pytest.mark.parametrize(
    ("where", "result"),
    [
        *(
            pytest.param(where, None, id=f"{where} raises")
            for where in ("plan", "admit", "observe", "policy_updated", "plain_forward_s", "take_calibration")
        ),
        *(pytest.param(where, result, id=name) for name, (where, result) in NONSENSE.items()),
    ],
)
def test_a_controller_that_fails_means_no_speculation(where, result):
    controller = Unplanned(["history", "random"], where, result)
    engine = engine_of(speculators=[HistorySpeculator(), RandomDrafter()], controller=controller)
    faults = 0
    for _ in range(3):
        output = generate(engine)
        assert output.completion_ids == reference().completion_ids
        faults += output.report.drafter_faults.get("controller", 0)
        engine.policy_updated()
    assert faults > 0
    controller.mended = True
    engine.policy_updated()
    generate(engine)
    assert generate(engine).report.drafter_faults == {}


class Student(RandomDrafter):
    """Learns in idle time, which fails, and may leave a weight behind that is no number."""

    name = "student"

    def __init__(self, number):
        super().__init__()
        self.number, self.weight, self.calls = number, torch.zeros(3), []

    def study(self):
        self.calls.append("study")
        self.weight[1] = self.number
        raise torch.OutOfMemoryError("the memory is full")

    def end_study(self):
        self.calls.append("end_study")

    def weights(self):
        yield self.weight


def test_an_error_in_idle_time_ends_only_that():
    """Servers whose weights stay have no policy update that would turn a drafter on again."""
    student = Student(0.5)
    engine = engine_with(student)
    generate(engine)
    guarded = engine._speculators["student"]
    for _ in range(2):
        assert not guarded.study()
    assert student.calls == ["study", "end_study"], "another drafter learns on meanwhile"
    guarded.end_study()
    report = generate(engine).report
    assert report.drafter_faults == {"student": 1}
    (warning,) = report.warnings
    assert "study() raised OutOfMemoryError: the memory is full; it drafts on" in warning
    assert report.drafted["student"] > 0
    assert not guarded.study()
    assert student.calls == ["study", "end_study", "end_study", "study", "end_study"], "in the next idle time, again"


def test_a_drafter_that_learned_nonsense_is_off():
    student = Student(torch.nan)
    engine = engine_with(student)
    generate(engine)
    assert not engine._speculators["student"].study()
    report = generate(engine).report
    assert report.drafter_faults == {"student": 2}
    assert report.drafted.get("student", 0) == 0
    assert any("a weight is not finite; it is off until" in warning for warning in report.warnings)
    assert engine._speculators["student"].is_off


def test_a_guarded_drafter_is_still_itself():
    drafter = HistorySpeculator()
    engine = engine_of(speculators=[drafter])
    guarded = engine._speculators["history"]
    assert isinstance(guarded, GuardedSpeculator)
    assert guarded.unguarded is drafter
    assert guarded.num_archived_tokens == 0
    assert copy.copy(guarded).name == "history"
    with pytest.raises(AttributeError):
        guarded.nothing  # noqa: B018
