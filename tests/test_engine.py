"""The engine: one seed, one text, whatever drafts; edges of a batch; bad input; reports that add up."""

from __future__ import annotations

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from atlas_rl import AtlasRolloutEngine, StepReport
from atlas_rl.rollout.controller import FixedController, Step
from atlas_rl.rollout.goodput import GoodputController
from atlas_rl.rollout.report import PHASES
from atlas_rl.rollout.sinks import read_jsonl
from atlas_rl.speculators.base import Draft
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.history import HistorySpeculator
from tests.drafters import Parrot, RandomDrafter, Stateless, TrimByDrawnToken
from tests.models import FACTORIES, tiny_gpt2, tiny_llama

VOCAB, CONTEXT = 64, 128
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4, 11, 2, 9, 5, 6], [5, 9, 2], [0, 63]]
SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.4},
    "everything": {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.8},
}
EOS = [17, 40, 35]
MAX_NEW = 18


@cache
def policy():
    return tiny_llama(seed=11)


@cache
def draft_model():
    return tiny_llama(layers=1, seed=12)


def engine_of(model=None, **options):
    return AtlasRolloutEngine(model=model or policy(), console=False, **options)


def fixed(speculator, k, controller=FixedController):
    """An engine whose only speculator drafts `k` tokens on every step."""
    return engine_of(speculators=[speculator], controller=controller([speculator.name], speculator.name, k))


def generate(engine, prompts=PROMPTS, **options):
    return engine.generate(
        prompts, **({"max_new_tokens": MAX_NEW, "eos_token_ids": EOS, "seed": 3, "num_generations": 2} | options)
    )


@cache
def reference(name="plain"):
    """What the engine gives without speculation."""
    output = generate(engine_of(speculation=False), **SETTINGS[name])
    assert len({tuple(row) for row in output.completion_ids}) > 5
    assert len({len(row) for row in output.completion_ids}) > 1  # some stop early, some do not
    return output


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [name for name, module in model.named_modules() if "forward" in module.__dict__],
        model.config.to_dict(),
        model.config._attn_implementation,
        torch.is_grad_enabled(),
    )


def processed_logprobs(model, prompt, completion, options):
    """Log-softmax of the processed logits at every completion token, by transformers' own means: `[tokens, vocab]`."""
    tokens = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        processors.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    rows = [processors(tokens[:, :n], logits[None, n - 1]) for n in range(len(prompt), len(prompt) + len(completion))]
    return torch.cat(rows).log_softmax(-1)


# --------------------------------------------------------------------------------------------------------- invariance


def parrot(error_rate):
    return Parrot(reference().completion_ids, error_rate=error_rate)


ARMS = {
    **{f"random, k={k}": (lambda k=k: fixed(RandomDrafter(), k)) for k in (1, 5)},
    **{f"parrot, 30% wrong, k={k}": (lambda k=k: fixed(parrot(0.3), k)) for k in (1, 2, 3, 5, 8)},
    **{f"parrot, {rate:.0%} wrong, k=5": (lambda rate=rate: fixed(parrot(rate), 5)) for rate in (0, 0.1, 0.6, 1)},
    **{f"draft LM, k={k}": (lambda k=k: fixed(DraftLM(draft_model(), VOCAB), k)) for k in (1, 3, 8)},
    "draft LM that is the policy": lambda: fixed(DraftLM(policy(), VOCAB), 4),
    "history, k=5": lambda: fixed(HistorySpeculator(), 5),
    "trimmed by the drawn token": lambda: fixed(RandomDrafter(), 5, TrimByDrawnToken),
    "trimmed parrot": lambda: fixed(parrot(0.2), 8, TrimByDrawnToken),
    "controller, history": lambda: engine_of(),
    "controller, history and draft LM": lambda: engine_of(draft_model=draft_model()),
    "controller, random": lambda: engine_of(speculators=[RandomDrafter()]),
    "controller, parrot": lambda: engine_of(speculators=[parrot(0.1)]),
    "controller, four": lambda: engine_of(
        speculators=[
            RandomDrafter(),
            parrot(0.1),
            HistorySpeculator(),
            DraftLM(draft_model(), VOCAB),
        ]
    ),
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_tokens_do_not_depend_on_what_is_drafted(arm):
    engine = ARMS[arm]()
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    if "history" in arm:  # the second time, the history has all of it
        engine.policy_updated()
        output = generate(engine)
        assert output.completion_ids == reference().completion_ids
    assert np.allclose(np.concatenate(output.logprobs), np.concatenate(reference().logprobs), atol=1e-4)
    if "controller" not in arm:
        assert sum(output.report.drafted.values()) > 0


def test_a_perfect_drafter_is_always_accepted_and_shortens_the_run():
    engine = fixed(parrot(0), 8)
    report = generate(engine).report
    assert report.accepted == report.drafted
    assert report.num_forwards < reference().report.num_forwards / 4
    assert report.accepted_length > 4


def test_the_policy_drafting_for_itself_is_always_accepted():
    """Coupled noise: the draft LM draws what the policy will draw."""
    report = generate(fixed(DraftLM(policy(), VOCAB), 4)).report
    assert report.acceptance_rate == 1


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "plain"])
def test_the_tokens_do_not_depend_on_drafts_under_any_sampling(setting):
    wanted = reference(setting).completion_ids
    for engine in (fixed(Parrot(wanted, error_rate=0.3), 5), fixed(DraftLM(draft_model(), VOCAB), 3), engine_of()):
        assert generate(engine, **SETTINGS[setting]).completion_ids == wanted


@pytest.mark.parametrize("name", [name for name in sorted(FACTORIES) if name != "llama"])
def test_the_tokens_do_not_depend_on_drafts_in_any_family(name):
    model = FACTORIES[name](seed=13)
    wanted = generate(engine_of(model, speculation=False)).completion_ids
    drafter = Parrot(wanted, error_rate=0.3)
    engine = engine_of(model, speculators=[drafter], controller=FixedController(["parrot"], "parrot", 5))
    output = generate(engine)
    assert output.completion_ids == wanted
    assert 0 < output.report.acceptance_rate < 1


def test_greedy_tokens_do_not_depend_on_drafts_either():
    wanted = generate(engine_of(speculation=False), temperature=0.0).completion_ids
    for engine in (fixed(Parrot(wanted, error_rate=0.3), 5), fixed(DraftLM(draft_model(), VOCAB), 3), engine_of()):
        assert generate(engine, temperature=0.0).completion_ids == wanted


def test_a_draft_lm_with_a_shorter_context_stops_drafting_where_it_ends():
    short = tiny_gpt2(context=24, seed=14)
    engine = fixed(DraftLM(short, VOCAB), 4)
    prompts = [[1, 2, 3], list(range(30)), [4] * 18]
    wanted = generate(engine_of(speculation=False), prompts).completion_ids
    assert generate(engine, prompts).completion_ids == wanted
    # Alone, a short prompt is drafted for until the draft LM's context is full, and then no more.
    output = generate(engine, [[1, 2, 3]], max_new_tokens=40, num_generations=1, eos_token_ids=[])
    assert (
        output.completion_ids
        == generate(
            engine_of(speculation=False), [[1, 2, 3]], max_new_tokens=40, num_generations=1, eos_token_ids=[]
        ).completion_ids
    )
    assert 0 < output.report.drafted["draft_lm"] <= 21 * 4


# ------------------------------------------------------------------------------------------------------------- seeds


def test_a_seed_gives_the_same_tokens_whatever_ran_before():
    engine = engine_of(draft_model=draft_model())
    torch.manual_seed(1)
    generate(engine, [[1, 2]], seed=99, max_new_tokens=5)
    engine.policy_updated()
    torch.manual_seed(2)
    generate(engine, seed=4, temperature=0.5)
    assert generate(engine).completion_ids == reference().completion_ids


def test_another_seed_gives_other_tokens():
    other = generate(engine_of(), seed=4).completion_ids
    assert sum(a == b for a, b in zip(other, reference().completion_ids, strict=True)) <= 1


def test_generations_of_one_prompt_differ():
    rows = generate(engine_of(), [[5, 9, 2]], num_generations=8, max_new_tokens=12).completion_ids
    assert len({tuple(row) for row in rows}) >= 7


def test_without_a_seed_torch_decides():
    engine = engine_of(speculation=False)
    torch.manual_seed(5)
    first, second = generate(engine, seed=None).completion_ids, generate(engine, seed=None).completion_ids
    torch.manual_seed(5)
    assert generate(engine, seed=None).completion_ids == first
    assert first != second


def test_a_seed_leaves_the_global_random_state_alone():
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    generate(engine_of(draft_model=draft_model()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


# ------------------------------------------------------------------------------------------------- edges of the batch


def test_rows_come_back_prompt_by_prompt():
    output = generate(engine_of(), num_generations=3)
    assert output.prompt_ids == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len(output.completion_ids) == len(output.logprobs) == 15
    assert [len(row) for row in output.logprobs] == [len(row) for row in output.completion_ids]
    # A request's noise is that of its row; so repeating the prompts by hand is the same.
    by_hand = generate(engine_of(), [prompt for prompt in PROMPTS for _ in range(3)], num_generations=1)
    assert by_hand.completion_ids == output.completion_ids


@pytest.mark.parametrize("max_batch_size", [1, 3, 9])
@pytest.mark.parametrize("speculation", [False, True])
def test_waves_give_the_same_tokens(max_batch_size, speculation):
    engine = engine_of(max_batch_size=max_batch_size, speculation=speculation)
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    assert max(active for _, active in output.report.active_batch_curve) <= max_batch_size


def test_waves_give_the_same_tokens_with_a_draft_lm():
    drafter = DraftLM(draft_model(), VOCAB)
    engine = engine_of(max_batch_size=3, speculators=[drafter], controller=FixedController(["draft_lm"], "draft_lm", 3))
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    unlimited = generate(fixed(DraftLM(draft_model(), VOCAB), 3)).report
    assert abs(output.report.acceptance_rate - unlimited.acceptance_rate) < 0.1


def test_a_prefill_in_chunks_gives_the_same_tokens(monkeypatch):
    from atlas_rl.rollout import loop

    monkeypatch.setattr(loop, "PREFILL_TOKENS", 4)
    assert generate(engine_of()).completion_ids == reference().completion_ids


def test_a_batch_of_one():
    """Request 0 of a call has the same noise whatever the rest of the batch is."""
    output = generate(engine_of(), PROMPTS[:1], num_generations=1)
    assert output.completion_ids == reference().completion_ids[:1]
    assert output.report.num_requests == 1


def test_a_completion_ends_with_its_first_ending_token():
    endless = generate(engine_of(), eos_token_ids=[])
    assert {len(row) for row in endless.completion_ids} == {MAX_NEW}
    stopped = 0
    for row, full in zip(reference().completion_ids, endless.completion_ids, strict=True):
        ends = [i for i, token in enumerate(full) if token in EOS]
        assert row == full[: ends[0] + 1 if ends else None]
        stopped += bool(ends)
    assert 2 <= stopped < len(PROMPTS) * 2  # both happen


def test_drafts_behind_an_ending_token_are_dropped():
    endless = generate(engine_of(), eos_token_ids=[]).completion_ids
    output = generate(fixed(Parrot(endless, error_rate=0), 8))
    assert output.completion_ids == reference().completion_ids
    assert output.report.accepted == output.report.drafted  # neither accepted nor rejected behind the end


@pytest.mark.parametrize("speculation", [False, True])
def test_one_token(speculation):
    output = generate(engine_of(speculation=speculation), max_new_tokens=1)
    assert output.completion_ids == [row[:1] for row in reference().completion_ids]
    assert output.report.num_forwards == 0
    assert output.report.accepted_length == 1
    assert not output.report.warnings


def test_no_false_alarm_where_there_is_little_to_draft():
    assert not generate(fixed(RandomDrafter(), 3), max_new_tokens=2).report.warnings  # no room for a draft at all
    assert not generate(fixed(Mute(), 3), [[1]], max_new_tokens=6).report.warnings


@pytest.mark.parametrize("spare", [0, 1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_that_fills_the_context(family, spare):
    """Every position of the context is run, and one more token drawn from the last."""
    model = FACTORIES[family](context=32, seed=15)
    prompt = np.random.default_rng(0).integers(VOCAB, size=32 - spare).tolist()
    plain = generate(engine_of(model, speculation=False), [prompt, [1]], eos_token_ids=[], max_new_tokens=50)
    assert [len(row) for row in plain.completion_ids] == [spare + 1] * 2 + [32] * 2
    drafter = Parrot(plain.completion_ids, error_rate=0.2)
    engine = engine_of(model, speculators=[drafter], controller=FixedController(["parrot"], "parrot", 8))
    output = generate(engine, [prompt, [1]], eos_token_ids=[], max_new_tokens=50)
    assert output.completion_ids == plain.completion_ids


def test_greedy_is_what_transformers_generates():
    model = tiny_llama(seed=16)
    prompts = [*PROMPTS, list(range(30)), [9] * 17]
    output = generate(
        engine_of(model), prompts, temperature=0.0, eos_token_ids=[], num_generations=1, max_new_tokens=40
    )
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=0)
    assert output.completion_ids == theirs[:, width:].tolist()
    assert len({tuple(row) for row in output.completion_ids}) >= len(prompts) - 1


def test_ending_tokens_come_from_tokenizer_and_policy():
    model = tiny_llama(seed=11)
    model.generation_config.eos_token_id = EOS[:2]
    engine = AtlasRolloutEngine(model=model, tokenizer=tokenizer(eos=EOS[2]), console=False)
    assert generate(engine, eos_token_ids=None).completion_ids == reference().completion_ids


# ---------------------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("setting", SETTINGS)
def test_logprobs_are_those_of_a_plain_forward(setting):
    output = generate(fixed(Parrot(reference(setting).completion_ids, error_rate=0.3), 5), **SETTINGS[setting])
    entropy, likeliest = [], []
    for prompt, completion, logprobs in zip(output.prompt_ids, output.completion_ids, output.logprobs, strict=True):
        rows = processed_logprobs(policy(), prompt, completion, SETTINGS[setting])
        own = rows.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert (own - torch.tensor(logprobs)).abs().max() < 1e-4
        entropy += torch.special.entr(rows.exp()).sum(-1).tolist()
        likeliest += rows.exp().amax(-1).tolist()
    assert output.report.entropy == pytest.approx(np.mean(entropy), abs=1e-4)
    assert output.report.mean_max_prob == pytest.approx(np.mean(likeliest), abs=1e-4)


def test_greedy_logprobs_are_the_policys_own():
    output = generate(engine_of(), temperature=0.0)
    for prompt, completion, logprobs in zip(output.prompt_ids, output.completion_ids, output.logprobs, strict=True):
        rows = processed_logprobs(policy(), prompt, completion, {})
        assert (rows.amax(-1) - torch.tensor(logprobs)).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize("arm", ["controller, four", "parrot, 30% wrong, k=3", "draft LM, k=3"])
def test_a_report_adds_up(arm):
    engine = ARMS[arm]()
    output = generate(engine)
    report = output.report
    lengths = [len(row) for row in output.completion_ids]
    assert report.num_tokens == report.num_scored_tokens == sum(lengths)
    assert report.completion_lengths == tuple(lengths)
    assert report.num_requests == 10
    assert report.num_prompt_tokens == sum(map(len, output.prompt_ids))
    assert report.num_decoded_tokens == sum(lengths) - 10  # the first of each comes from the prefill
    accepted = sum(report.accepted.values())
    # Every request and forward commits its accepted drafts and one more, unless an accepted draft ended it.
    assert 0 <= report.num_request_forwards + accepted - report.num_decoded_tokens <= 10
    assert report.accepted_length == report.num_decoded_tokens / report.num_request_forwards
    assert all(report.drafted[name] >= report.accepted[name] >= 0 for name in report.drafted)
    assert sum(report.drafted_by_position) == sum(report.drafted.values())
    assert sum(report.accepted_by_position) == accepted
    assert list(report.drafted_by_position) == sorted(report.drafted_by_position, reverse=True)
    seconds = [getattr(report, f"{phase}_s") for phase in (*PHASES, "other")]
    assert min(seconds) >= 0
    assert sum(seconds) == pytest.approx(report.generate_s)
    assert min(report.prefill_s, report.verify_s, report.sample_s, report.draft_s) > 0
    assert report.tokens_per_s == pytest.approx(report.num_tokens / report.generate_s)
    assert report.no_speculation_s > 0
    assert report.mode == "standalone"
    assert report.policy_version == 0


def test_a_report_without_speculation():
    report = reference().report
    assert not report.speculation
    assert report.accepted_length == 1
    assert report.acceptance_rate is None
    assert report.no_speculation_s is None
    assert report.num_forwards == max(report.completion_lengths) - 1
    assert report.draft_s < 0.02 * report.generate_s


def test_reports_are_kept_printed_and_written(tmp_path, capsys):
    engine = AtlasRolloutEngine(model=policy(), output_dir=tmp_path / "new" / "folder")
    first, second = generate(engine), generate(engine)
    assert engine.reports == [first.report, second.report]
    assert [report.step for report in engine.reports] == [0, 1]
    assert len([line for line in capsys.readouterr().out.splitlines() if "tok/s" in line]) == 2
    rows = read_jsonl(tmp_path / "new" / "folder" / "rollouts.jsonl")
    assert [StepReport.from_dict(row).to_dict() for row in rows] == [report.to_dict() for report in engine.reports]


class Mute(Stateless):
    """Has nothing to say."""

    name = "mute"

    def propose(self, sequences, requests, max_draft_tokens):
        return Draft.empty(len(requests))


def test_a_drafter_that_is_always_wrong_is_named(capsys):
    wrong = [[(token + 1) % VOCAB for token in row] for row in reference().completion_ids]
    engine = AtlasRolloutEngine(
        model=policy(),
        speculators=[Parrot(wrong, error_rate=0)],
        controller=FixedController(["parrot"], "parrot", 4),
    )
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    assert output.report.drafted["parrot"] >= 200
    (warning,) = output.report.warnings
    assert "parrot" in warning
    assert "none of" in warning
    assert "parrot" in capsys.readouterr().out


def test_a_drafter_that_proposes_nothing_is_named():
    (warning,) = generate(fixed(Mute(), 4)).report.warnings
    assert "mute" in warning
    assert "proposed none" in warning


def test_a_living_drafter_is_not_warned_of():
    assert not generate(fixed(parrot(0.5), 4)).report.warnings


# ---------------------------------------------------------------------------------------- state, versions, exceptions


class Exploding(RandomDrafter):
    """Works for three calls of one of its methods, then raises."""

    name = "exploding"

    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, 0

    def _tick(self, where):
        self.calls += where == self.where
        if self.calls == (1 if self.where == "start" else 4) and where == self.where:
            raise RuntimeError(f"boom in {where}")

    def start(self, sequences, requests):
        self._tick("start")

    def propose(self, sequences, requests, max_draft_tokens):
        self._tick("propose")
        return super().propose(sequences, requests, max_draft_tokens)

    def observe(self, sequences, verified):
        self._tick("observe")


@pytest.mark.parametrize("where", ["start", "propose", "observe"])
def test_an_exception_of_a_speculator_is_not_hidden_and_leaves_no_trace(where):
    model = tiny_gpt2(seed=17)
    model.train()
    model.transformer.h[0].eval()
    before = state_of(model)
    wanted = generate(engine_of(model, speculation=False)).completion_ids
    speculators = [Exploding(where), HistorySpeculator(), DraftLM(tiny_llama(seed=12), VOCAB)]
    engine = engine_of(model, speculators=speculators)
    engine._controller = FixedController([s.name for s in speculators], "exploding", 3)
    with pytest.raises(RuntimeError, match=f"boom in {where}"):
        generate(engine)
    assert state_of(model) == before
    assert engine.reports == []
    assert generate(engine).completion_ids == wanted
    assert state_of(model) == before


def test_a_policy_update_moves_the_version_and_refreshes():
    class Listener(RandomDrafter):
        refreshed = ()

        def refresh(self, rollouts, policy_version):
            self.refreshed += ((len(rollouts.sequences.lengths), rollouts.sequences.policy_version, policy_version),)

    listener = Listener()
    engine = engine_of(speculators=[listener])
    engine.policy_updated()  # nothing to learn from yet
    assert engine.policy_version == 1
    assert generate(engine).report.policy_version == 1
    engine.policy_updated()
    assert generate(engine, [[1]]).report.policy_version == 2
    engine.policy_updated(version=7)
    output = generate(engine)
    assert output.report.policy_version == 7
    assert output.report.refresh_s > 0
    assert listener.refreshed == ((10, 1, 2), (2, 2, 7))
    assert generate(engine).report.refresh_s == 0


def test_the_history_learns_from_one_step_to_the_next():
    engine = fixed(HistorySpeculator(), 6)
    first = generate(engine).report
    engine.policy_updated()
    assert generate(engine).report.accepted_length > first.accepted_length + 0.5


def test_state_makes_a_resumed_run_draft_as_well():
    engine = fixed(HistorySpeculator(), 6)
    generate(engine)
    engine.policy_updated()
    state = engine.state_dict()
    assert set(state) == {"history"}
    first, resumed, cold = generate(engine), fixed(HistorySpeculator(), 6), fixed(HistorySpeculator(), 6)
    resumed.load_state_dict(state)
    again = generate(resumed)
    assert again.completion_ids == first.completion_ids
    assert again.report.accepted == first.report.accepted
    assert generate(cold).report.accepted["history"] < again.report.accepted["history"]


def test_state_waits_for_an_engine_that_has_not_met_its_policy():
    engine = engine_of()
    generate(engine)
    state = engine.state_dict()
    attached = AtlasRolloutEngine(console=False)
    attached.load_state_dict(state)
    assert attached.state_dict() == state
    attached._model = policy()  # what `attach` passes with every rollout
    generate(attached, [[1]], max_new_tokens=1)
    history = attached._speculators["history"]
    assert history.num_archived_tokens == engine._speculators["history"].num_archived_tokens > 0


def test_the_state_of_another_speculator_is_refused():
    with pytest.raises(ValueError, match=r"\['mute'\].*lacks.*history"):
        engine_of().load_state_dict({"mute": {"depth": 3}})
    engine_of().load_state_dict({"mute": {}})  # it had nothing to restore


# ---------------------------------------------------------------------------------------------------- the controller's say


class AskSome(FixedController):
    """Asks for every second request only."""

    def plan(self, step):
        return {name: np.where(np.arange(step.batch) % 2 == 0, most, 0) for name, most in super().plan(step).items()}


class Watched(RandomDrafter):
    """Keeps the number of requests that each call was about."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def propose(self, sequences, requests, max_draft_tokens):
        assert (max_draft_tokens > 0).all()
        self.asked.append(len(requests))
        return super().propose(sequences, requests, max_draft_tokens)


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_speculators_are_asked_for_the_wanted_requests_only(verification):
    drafter = Watched()
    controller = AskSome(["random"], "random", 3)
    output = generate(engine_of(speculators=[drafter], controller=controller, verification=verification))
    assert set(drafter.asked) <= {1, 2, 3, 4, 5, 6, 7, 8} - {len(output.completion_ids)}
    assert output.report.drafted["random"] > 0
    if verification == "invariant":
        assert output.completion_ids == reference().completion_ids


def test_a_trace_says_what_was_expected_and_what_came(tmp_path):
    engine = engine_of(output_dir=tmp_path, trace=True, speculators=[parrot(0.1)])
    reports = [generate(engine).report for _ in range(2)]
    steps = [json.loads(line) for line in (tmp_path / "controller.jsonl").read_text().splitlines()]
    for call, report in enumerate(reports):
        own = [step for step in steps if step["call"] == call]
        assert [step["step"] for step in own] == list(range(report.num_forwards))
        assert sum(step["tokens"] for step in own) == report.num_decoded_tokens
        assert sum(step["forward_s"] for step in own) == pytest.approx(report.verify_s, rel=0.01)
        assert all(step["step_s"] >= step["forward_s"] for step in own)
    assert any(step["admitted"] for step in steps)
    assert sum(reports[-1].scored.values()) > 0
    assert 0 <= reports[-1].calibration_error["parrot"] < 1


def test_a_trace_of_plain_decoding_says_that_nothing_was_asked(tmp_path):
    report = generate(engine_of(output_dir=tmp_path, trace=True, speculators=[])).report
    steps = [json.loads(line) for line in (tmp_path / "controller.jsonl").read_text().splitlines()]
    assert len(steps) == report.num_forwards
    assert not any(step["asked"] or step["admitted"] for step in steps)


# ----------------------------------------------------------------------------------------------------------- bad input


def tokenizer(words="w", eos=0):
    own = {f"{words}{i}": i for i in range(VOCAB)}
    model = Tokenizer(WordLevel(own, unk_token=f"{words}0"))
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=f"{words}{eos}", unk_token=f"{words}0")


BAD_CALLS = {
    "no prompts": ({"prompts": []}, "at least one"),
    "empty prompt": ({"prompts": [[1], []]}, r"prompt 1 is empty.*at least one token"),
    "a flat list": ({"prompts": [1, 2, 3]}, "flat list of token ids"),
    "text": ({"prompts": ["hello"]}, "token ids"),
    "floats": ({"prompts": [[1.0, 2.0]]}, "token ids"),
    "token beyond the vocabulary": ({"prompts": [[1], [2, 64]]}, r"prompt 1.*64.*vocabulary of 64"),
    "negative token": ({"prompts": [[-1]]}, r"-1.*vocabulary"),
    "prompt beyond the context": ({"prompts": [[1] * 129]}, r"129 tokens.*context of 128"),
    "no tokens wanted": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    "half a token wanted": ({"max_new_tokens": 2.5}, "max_new_tokens"),
    "no generations": ({"num_generations": 0}, "num_generations must be at least 1"),
    "temperature below 0": ({"temperature": -0.1}, "temperature"),
    "temperature NaN": ({"temperature": math.nan}, "temperature"),
    "top_p 0": ({"top_p": 0.0}, r"top_p.*\(0, 1\]"),
    "top_p above 1": ({"top_p": 1.1}, "top_p"),
    "top_k below 0": ({"top_k": -1}, "top_k"),
    "min_p above 1": ({"min_p": 2}, "min_p"),
    "no penalty": ({"repetition_penalty": 0}, "repetition_penalty"),
    "negative seed": ({"seed": -1}, "seed"),
    "ending token outside": ({"eos_token_ids": [64]}, "eos_token_ids.*64"),
    "unknown option": ({"temprature": 1}, r"generate\(\).*did you mean 'temperature'"),
    "no ending token": ({"eos_token_ids": None}, "tokenizer"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_says_what_to_do_and_does_nothing(case):
    options, message = BAD_CALLS[case]
    engine, before = engine_of(), state_of(policy())
    with pytest.raises(ValueError, match=message):
        generate(engine, **options)
    assert engine.reports == []
    assert engine._calls == 0
    assert state_of(policy()) == before
    assert generate(engine).completion_ids == reference().completion_ids


BAD_OPTIONS = {
    "unknown option": ({"draft_modle": None}, "did you mean 'draft_model'"),
    "verification typo": ({"verification": "invarient"}, "'invariant' or 'rejection'.*'invarient'"),
    "unknown backend": ({"backend": "vlm"}, "backend"),
    "batch of none": ({"max_batch_size": 0}, "max_batch_size"),
    "a draft LM with another vocabulary": ({"draft_model": tiny_llama(vocab=32)}, "32 tokens.*64.*tokenizer"),
    "a draft LM that is no LM": ({"draft_model": nn.Linear(2, 2)}, "AutoModelForCausalLM"),
    "a draft LM that is not there": ({"draft_model": "/no/such/folder"}, "no checkpoint"),
    "a trace without a folder": ({"trace": True}, "output_dir"),
    "two names alike": ({"speculators": [RandomDrafter(), RandomDrafter()]}, "different names"),
    "draft LM and speculators": ({"draft_model": nn.Linear(2, 2), "speculators": [RandomDrafter()]}, "either"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_says_what_to_do(case):
    options, message = BAD_OPTIONS[case]
    before = state_of(policy())
    with pytest.raises(ValueError, match=message):
        engine_of(**options)
    assert state_of(policy()) == before


def test_an_engine_without_a_policy_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"model=.*attach"):
        AtlasRolloutEngine().generate([[1]], max_new_tokens=2)


def test_a_checkpoint_folder_serves_as_draft_lm(tmp_path):
    draft_model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    engine = AtlasRolloutEngine(
        model=policy(),
        tokenizer=tokenizer(),
        draft_model=tmp_path,
        console=False,
        controller=FixedController(["history", "recurrent", "draft_lm"], "draft_lm", 3),
    )
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    loaded_in_memory = generate(fixed(DraftLM(draft_model(), VOCAB), 3)).report
    assert output.report.accepted["draft_lm"] == loaded_in_memory.accepted["draft_lm"] > 0


def test_a_draft_lm_with_another_tokenizer_is_refused(tmp_path):
    draft_model().save_pretrained(tmp_path)
    tokenizer(words="x").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        AtlasRolloutEngine(model=policy(), tokenizer=tokenizer(), draft_model=str(tmp_path), console=False)


def test_a_controller_for_other_speculators_is_refused():
    with pytest.raises(ValueError, match=r"made for speculators \['a'\], the engine has \['history', 'recurrent'\]"):
        engine_of(controller=FixedController(["a"], "a", 2))


def test_a_fixed_controller_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="no speculator 'b'"):
        FixedController(["a"], "b", 2)
    with pytest.raises(ValueError, match="speculation=False"):
        FixedController(["a"], "a", 0)


def test_a_goodput_controller_without_speculators_plans_nothing():
    assert GoodputController(()).plan(Step(np.full(4, 9), 0, [])) == {}
