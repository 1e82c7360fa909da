"""No request takes an engine down: every sampling option, greedy or drawn, alone or mixed, and fields that clients make up.

Nobody announces these requests, as on a server, and the engine returns raw logprobs, as servers do by default.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl.controller.fixed import FixedController, NoSpeculation
from atlas_rl.core import REPETITION_PENALTIES, Draft, SamplingParams, Sequences
from atlas_rl.decode.guard import GuardedController, GuardedSpeculator
from atlas_rl.speculators.base import Speculator
from atlas_rl.vllm.checks import check_sampling
from atlas_rl.vllm.draw import draw
from atlas_rl.vllm.following import RequestFollower
from atlas_rl.vllm.internals import ForwardBatch, drafter_of, runner_of
from atlas_rl.vllm.proposer import AtlasProposer
from atlas_rl.vllm.request_fields import EXTRA_REQUEST, announced_as, sampling_of
from tests.drafters import RandomDrafter, Recalled, Stateless
from tests.models import tiny_bigram
from tests.vllm_engines import completions, engine  # first: it skips this module where there is no vLLM

VOCAB, CONTEXT = 64, 128
PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10]]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.2},
    "frequency penalty": {"frequency_penalty": 0.7},
    "presence penalty": {"presence_penalty": -0.5},
    "bad words": {"_bad_words_token_ids": [[3], [4, 5], [9, 9]]},
    "allowed tokens": {"allowed_token_ids": list(range(10, 30))},
    "minimal length": {"min_tokens": 9, "stop_token_ids": list(range(0, VOCAB, 2))},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "logprobs": {"logprobs": 4},
    "all at once": {"repetition_penalty": 1.3, "top_k": 20, "top_p": 0.9, "min_tokens": 3, "stop_token_ids": [1]},
    "nothing allowed": {"allowed_token_ids": [3], "_bad_words_token_ids": [[3]]},
    "a penalty that overflows": {"repetition_penalty": 1e-40},
    "a context to its end": {"max_tokens": CONTEXT},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    tiny_bigram(vocab=VOCAB, hidden=64, heads=2, kv_heads=2, layers=2, context=CONTEXT, logit_std=3.0).save_pretrained(
        path
    )
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    return engine(folder, max_num_seqs=16, logprobs_mode="raw_logprobs")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """vLLM without our proposer."""
    return engine(folder, max_num_seqs=16, logprobs_mode="raw_logprobs", speculative_config=None)


def drafting(llm: Any) -> Any:
    drafter: Any = drafter_of(llm)
    drafter.prepare()
    return drafter.drafting


def draft_with(llm: Any, speculator: Speculator | None) -> None:
    """Always draft three random tokens, say, or nothing."""
    own = drafting(llm)
    if speculator is None:
        own.use({}, NoSpeculation())
        return
    name = speculator.name
    controller = GuardedController(FixedController([name], name, 3), own.faults)
    own.use({name: GuardedSpeculator(speculator, own.faults)}, controller)


def params(temperature: float, seed: int | None = 0, **options: Any) -> Any:
    from vllm import SamplingParams

    bad_words = options.pop("_bad_words_token_ids", None)
    given = {"temperature": temperature, "seed": seed, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    made = SamplingParams(**(given | options))
    if bad_words is not None:
        made._bad_words_token_ids = bad_words  # without a tokenizer there are no words
    return made


def ask(llm: Any, each: list[Any]) -> list[list[int]]:
    prompts = [{"prompt_token_ids": PROMPTS[i % len(PROMPTS)]} for i in range(len(each))]
    return completions(llm.generate(prompts, each, use_tqdm=False))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_greedy_drawn_and_mixed_whatever_is_drafted(name: str, llm: Any, plain: Any) -> None:
    batches = [
        [params(0.0, **OPTIONS[name])],
        [params(0.0, **OPTIONS[name]) for _ in range(3)],
        [params(0.8, seed, **OPTIONS[name]) for seed in range(3)],
        [params(t, seed, **OPTIONS[name]) for seed, t in enumerate((0.0, 0.8, 0.0, 1.3))]
        + [params(0.0), params(1.0, 7)],
    ]
    for batch in batches:
        draft_with(llm, None)
        expected = ask(llm, batch)
        texts = [(PROMPTS[i % len(PROMPTS)], text) for i, text in enumerate(expected)]
        for drafter in (RandomDrafter(), Recalled(texts, 3)):
            draft_with(llm, drafter)
            assert ask(llm, batch) == expected, drafter.name
        greedy = [i for i, one in enumerate(batch) if one.temperature == 0]
        if name not in ("nothing allowed", "a penalty that overflows"):  # any token is as good as another there
            theirs = ask(plain, batch)
            assert [expected[i] for i in greedy] == [theirs[i] for i in greedy]
    report = drafting(llm).take_report()
    assert report.drafter_faults == {}
    assert report.entropy is None or np.isfinite(report.entropy)
    assert report.warnings == ()


def test_logprobs_are_vllms_own(llm: Any, plain: Any) -> None:
    draft_with(llm, RandomDrafter())
    given = [params(0.0, logprobs=3, repetition_penalty=1.2), params(0.0, logprobs=0)]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:2]]
    ours, theirs = (one.generate(prompts, given, use_tqdm=False) for one in (llm, plain))
    for own, other in zip(ours, theirs, strict=True):
        for mine, its in zip(own.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert {token: entry.rank for token, entry in mine.items()} == {t: e.rank for t, e in its.items()}
            assert [mine[t].logprob for t in its] == pytest.approx([e.logprob for e in its.values()], abs=1e-4)


MADE_UP = ["abc", -1, 1 << 63, 1.5, True, None, [], [0, 0], [0, 1, 2], ["0", "0"], {"a": 1}]


@pytest.mark.parametrize("value", MADE_UP, ids=str)
def test_fields_that_clients_make_up_are_not_trusted(value: Any, llm: Any) -> None:
    draft_with(llm, RandomDrafter())
    honest = ask(llm, [params(1.0, 3)])
    extra = {EXTRA_REQUEST: value, "atlas_rl_key": value}
    assert ask(llm, [params(1.0, 3, extra_args=extra)]) == honest
    assert drafting(llm).take_report().drafter_faults == {}


def test_replicas_of_a_server_draw_independent_samples_for_requests_without_a_seed(llm: Any) -> None:
    """vLLM deals equal requests out to its data-parallel replicas, and each replica numbers its own from one."""
    config = llm.llm_engine.vllm_config
    names = [f"request {i}" for i in range(8)]
    empty = np.zeros(8, np.int64)
    batch = ForwardBatch(names, empty[:, None], empty, empty, empty > 0, lambda name: params(1.0, seed=None))

    def keys(replica: int) -> set[int]:
        own = copy.copy(config)
        own.parallel_config = copy.copy(config.parallel_config)
        own.parallel_config.data_parallel_index = replica
        return set(AtlasProposer(own).keys(batch).tolist())

    assert len(keys(0) | keys(1) | keys(2)) == 24
    assert keys(1) == keys(1)  # so are those of all ranks of a tensor-parallel group
    assert keys(0) == set(RequestFollower(CONTEXT, 8, VOCAB, config.model_config.seed).keys(batch).tolist())


def test_a_limit_of_thinking_leaves_a_request_without_drafts() -> None:
    assert sampling_of(params(1.0)) is not None
    assert sampling_of(params(1.0, thinking_token_budget=5)) is None
    with pytest.raises(ValueError, match="thinking_token_budget"):
        check_sampling(SamplingParams(max_new_tokens=8), {"thinking_token_budget": 5})


@pytest.mark.parametrize("temperature", [1e-20, 0.005])
def test_temperatures_that_vllm_would_raise_are_refused(temperature: float) -> None:
    given = SamplingParams(max_new_tokens=8, temperature=temperature)
    with pytest.raises(ValueError, match=r"vLLM raises temperatures below 0\.01"):
        check_sampling(given, {})
    assert params(temperature).temperature == 0.01
    for kept in (0.0, 0.01):
        check_sampling(SamplingParams(max_new_tokens=8, temperature=kept), {})
        assert params(kept).temperature == kept


def test_only_the_running_call_announces() -> None:
    def request(value: Any) -> Any:
        return SimpleNamespace(extra_args={EXTRA_REQUEST: value})

    assert announced_as(request([7, 2]), 7, 3) == 2
    for value in [*MADE_UP, [7, 3], [7, -1], [6, 2], [7, True], [7.0, 2]]:
        assert announced_as(request(value), 7, 3) is None
    assert announced_as(request([7, 2]), None, 3) is None
    assert announced_as(SimpleNamespace(extra_args=None), 7, 3) is None


def test_parameters_that_ours_cannot_express_cost_drafts() -> None:
    vllm = params(0.7, stop_token_ids=[5, -3, 1 << 63])
    ours = sampling_of(vllm)
    assert ours is not None
    assert (ours.temperature, ours.eos_token_ids) == (0.7, (5,))
    vllm.repetition_penalty = float("inf")  # ours is the nearest, which only drafts are drawn with
    assert sampling_of(vllm).repetition_penalty == REPETITION_PENALTIES[1]
    vllm.top_p = float("nan")
    assert sampling_of(vllm) is None


class Failing(RandomDrafter):
    name = "failing"

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def __getattribute__(self, name: str) -> Any:
        if name in ("start", "backlog", "propose", "observe", "refresh") and name == self.__dict__.get("where"):
            raise RuntimeError("boom")
        return super().__getattribute__(name)


class Senseless(RandomDrafter):
    name = "senseless"

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        draft = super().propose(sequences, requests, max_draft_tokens)
        return Draft(draft.token_ids + VOCAB, draft.lengths, draft.confidence)


@pytest.mark.parametrize("where", ["start", "backlog", "propose", "observe", "refresh", "nonsense"])
def test_a_drafter_that_fails_costs_drafts(where: str, llm: Any) -> None:
    own, batch = drafting(llm), [params(t, seed) for seed, t in enumerate((0.0, 0.7, 1.0) * 4)]
    draft_with(llm, None)
    expected = ask(llm, batch)
    own.take_report()
    drafter = Senseless() if where == "nonsense" else Failing(where)
    draft_with(llm, drafter)
    if where == "refresh":
        ask(llm, batch)
        own.policy_updated()
    assert ask(llm, batch) == expected
    assert ask(llm, batch) == expected
    report = own.take_report()
    assert report.drafter_faults == {drafter.name: 1}
    assert any(warning.startswith(f"{drafter.name}: ") for warning in report.warnings)
    drafter.where = ""  # type: ignore[attr-defined]
    own.policy_updated()
    assert ask(llm, batch) == expected
    if where != "nonsense":
        assert own.take_report().drafted["failing"] > 0


class Hopeless(Stateless):
    """Drafts so many tokens that no request may draw."""

    name = "hopeless"

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        shape = len(requests), self.num_tokens
        lengths = np.minimum(max_draft_tokens, self.num_tokens)
        return Draft(np.full(shape, 3), lengths, np.full(shape, 0.5, np.float32))


@pytest.mark.parametrize(
    ("num_tokens", "arrives", "says"),
    [
        (0, True, "hopeless: asked for drafts during the whole step and proposed none"),
        (3, True, "hopeless: none of "),
        (3, False, "speculation is silently disabled: "),
    ],
)
def test_a_report_names_a_drafter_that_does_not_work(
    num_tokens: int, arrives: bool, says: str, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = drafting(llm)
    own.take_report()
    draft_with(llm, Hopeless(num_tokens))
    if not arrives:
        monkeypatch.setattr(runner_of(llm), "take_draft_token_ids", lambda: None)
    ask(llm, [params(1.0, seed, allowed_token_ids=list(range(10, 30))) for seed in range(8)])
    warnings = own.take_report().warnings
    assert [warning.startswith(says) for warning in warnings] == [True]
    assert own.take_report().warnings == ()


def test_an_error_of_our_own_costs_drafts(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own, batch = drafting(llm), [params(1.0, seed) for seed in range(4)]
    draft_with(llm, RandomDrafter())
    expected = ask(llm, batch)
    own.take_report()
    calls = itertools.count()
    read_prompts = own.requests.read_prompts

    def broken(forward: Any, known: np.ndarray) -> None:
        assert next(calls) != 3, "this step fails"
        read_prompts(forward, known)

    monkeypatch.setattr(own.requests, "read_prompts", broken)
    assert ask(llm, batch) == expected
    assert ask(llm, batch) == expected
    report = own.take_report()
    assert report.drafter_faults == {"drafting": 1}
    (warning,) = report.warnings
    assert warning.startswith("drafting: ")
    assert warning.endswith("; running requests get no more drafts")
    assert sum(report.drafted.values()) > 0, "newcomers are followed again"


def test_counters_of_a_server_that_nobody_asks_are_bounded(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas_rl.report import recorder
    from atlas_rl.vllm import traffic

    monkeypatch.setattr(recorder, "_CURVE_POINTS", 8)
    monkeypatch.setattr(traffic, "_KEPT_LENGTHS", 5)
    own = drafting(llm)
    own.take_report()
    own.traffic.reset()
    draft_with(llm, RandomDrafter())
    for seed in range(3):
        ask(llm, [params(1.0, seed, max_tokens=20) for _ in range(6)])
    assert len(own.recorder._active) <= 8
    report = own.take_report()
    assert (report.num_requests, report.num_tokens) == (18, 18 * 20)
    assert report.num_prompt_tokens == 3 * 2 * sum(map(len, PROMPTS))
    assert report.completion_lengths == (20,) * 5
    assert report.active_batch_curve[-1][0] < report.num_forwards


def test_positions_without_a_distribution_get_some_token() -> None:
    logits = torch.randn(4, 8)
    logits[0], logits[1, 3], logits[2, 5] = -torch.inf, torch.nan, torch.inf
    sound = logits[3].clone()
    keys, none = np.arange(4, dtype=np.uint64), np.zeros(4, np.int64)
    drawn = draw(logits, np.zeros(0, np.int64), none, keys, none + 9, np.array([True, False, False, False]), False)
    assert drawn.undefined is not None
    assert drawn.undefined[:, 0].tolist() == [True, True, True, False]
    assert ((drawn.token_ids >= 0) & (drawn.token_ids < 8)).all()
    assert drawn.token_ids[2, 0] == 5
    assert np.isfinite(drawn.logprobs).all()
    assert np.isfinite(drawn.entropies).all()
    assert drawn.logprobs[3, 0] == pytest.approx(float(sound.log_softmax(-1)[drawn.token_ids[3, 0]]), abs=1e-6)
