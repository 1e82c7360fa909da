"""What a serving engine does to requests, survived: rows move, requests pause, prompts come in pieces, contexts end.

Every run is compared with the in-process engine under the same seed: equal tokens say that nothing was lost or mixed up, and
an assertion in the drafting says that every committed token passed by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import Draft, Sequences
from atlas_rl.report.report import StepReport
from atlas_rl.speculators.dflash.checkpoint import save_dflash
from atlas_rl.speculators.eagle3.checkpoint import save_eagle3
from atlas_rl.speculators.eagle3.config import Eagle3Config
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.static_heads import head_speculator
from atlas_rl.vllm.backend import llm_arguments
from atlas_rl.vllm.internals import drafter_of, runner_of
from tests.dflash import head_for
from tests.drafters import RandomDrafter, Stateless
from tests.models import tiny_bigram
from tests.vllm_engines import completions, engine  # first: it skips this module where there is no vLLM

VOCAB, CONTEXT = 64, 128
PROMPTS = [list(range(2, 2 + n)) for n in (3, 40, 17, 40, 9, 25)]


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_bigram(vocab=VOCAB, hidden=64, heads=2, kv_heads=2, layers=3, context=CONTEXT, logit_std=3.0)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    return engine(folder, max_num_seqs=16)


def both(policy: Any, llm: Any, *, calls: int = 2, **options: Any) -> list[StepReport]:
    """Reports of a few calls on vLLM, after checking that the in-process engine generates the same."""
    given: dict[str, Any] = {"max_new_tokens": 60, "eos_token_ids": [0], "num_generations": 4} | options
    ours = AtlasRolloutEngine(model=llm, console=False)
    plain = AtlasRolloutEngine(model=policy, speculation=False, console=False)
    for seed in range(calls):
        output, expected = ours.generate(PROMPTS, seed=seed, **given), plain.generate(PROMPTS, seed=seed, **given)
        assert output.completion_ids == expected.completion_ids
        assert output.prompt_ids == expected.prompt_ids
        for own, other in zip(output.logprobs, expected.logprobs, strict=True):
            assert np.allclose(own, other, atol=1e-4)
        ours.policy_updated()
    return ours.reports


def test_requests_of_many_lengths_on_few_rows(policy: Any, llm: Any) -> None:
    reports = both(policy, llm, calls=3)
    assert reports[-1].drafted.keys() == {"history", "recurrent"}
    assert sum(reports[-1].accepted.values()) > 0
    assert reports[-1].accepted_length > 1
    for report in reports:
        assert report.num_requests == 24
        assert report.num_tokens == sum(report.completion_lengths)
        assert report.num_decoded_tokens == report.num_tokens - report.num_requests, "the first come from prefills"
        assert report.forward_s > 0
        assert report.entropy is not None
        assert not report.warnings


def test_the_estimate_of_a_run_without_drafts_is_that_run(llm: Any) -> None:
    class Silent(RandomDrafter):
        def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
            return None  # never ready

    made = AtlasRolloutEngine(model=llm, speculators=[Silent()], controller=_fixed("random"), console=False)
    report = made.generate(PROMPTS, num_generations=2, max_new_tokens=40, eos_token_ids=[0], seed=5).report
    assert sum(report.drafted.values()) == 0
    assert report.num_forwards == max(report.completion_lengths) - 1, "all requests run together"
    spent_s = report.prefill_s + report.sample_s + report.commit_s + report.other_s + report.forward_s
    assert report.no_speculation_s == pytest.approx(spent_s)


def test_preempted_requests_go_on_where_they_were(policy: Any, folder: Path) -> None:
    small = engine(folder, max_num_seqs=16, num_gpu_blocks_override=8, block_size=32, disable_log_stats=False)
    both(policy, small)
    preempted = [metric.value for metric in small.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(preempted) > 0, "the cache must be too small for this test"


def test_prompts_in_chunks_and_from_the_prefix_cache(policy: Any, folder: Path) -> None:
    chunked = engine(folder, max_num_seqs=16, max_num_batched_tokens=32, enable_prefix_caching=True, block_size=32)
    reports = both(policy, chunked)
    assert sum(reports[-1].drafted.values()) > 0


def test_drafts_go_on_to_the_end_of_the_context(policy: Any, folder: Path) -> None:
    short = engine(folder, max_num_seqs=16, max_model_len=48)
    made = AtlasRolloutEngine(model=short, speculators=[RandomDrafter()], controller=_fixed("random"), console=False)
    output = made.generate(PROMPTS, max_new_tokens=100, eos_token_ids=[], seed=0)
    assert [len(p) + len(c) for p, c in zip(output.prompt_ids, output.completion_ids, strict=True)] == [48] * 6
    plain = AtlasRolloutEngine(model=policy, speculation=False, console=False)
    expected = plain.generate(PROMPTS, max_new_tokens=100, eos_token_ids=[], seed=0).completion_ids
    assert [own == other[: len(own)] for own, other in zip(output.completion_ids, expected, strict=True)] == [True] * 6
    # All rows draft in every step, the ones close to the end included: 3 tokens, and fewer only where no more fit.
    assert output.report.drafted["random"] > 2.5 * output.report.num_request_forwards


def _fixed(name: str) -> FixedController:
    return FixedController([name], name, 3)


def _write_eagle3(folder: Path, policy: Any) -> None:
    torch.manual_seed(0)
    head = Eagle3Head(Eagle3Config(layer=policy.config, draft_vocab_size=VOCAB, layers=(0, 1, 2)))
    head.t2d.fill_(True)
    head.d2t.zero_()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    save_eagle3(folder, head, policy)


def _write_dflash(folder: Path, policy: Any) -> None:
    shape = {"hidden_size": 64, "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 1]}}
    save_dflash(folder, head_for(policy, **shape), 3)


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
@pytest.mark.parametrize("chunk", [None, 32], ids=["whole prompts", "chunks and prefix cache"])
def test_the_static_head_sees_what_it_sees_in_process(
    chunk: int | None, kind: str, policy: Any, folder: Path, tmp_path: Path
) -> None:
    {"eagle3": _write_eagle3, "dflash": _write_dflash}[kind](tmp_path, policy)
    options: dict[str, Any] = {"enable_prefix_caching": False}
    if chunk:
        options = {"max_num_batched_tokens": chunk, "block_size": 32}
    llm = engine(folder, max_num_seqs=32, **options, **llm_arguments(tmp_path))
    given: dict[str, Any] = {"max_new_tokens": 30, "eos_token_ids": [0], "num_generations": 4, "seed": 3}
    reports = []
    for model in (llm, policy):
        made = AtlasRolloutEngine(
            model=model, speculators=[head_speculator(tmp_path)], controller=_fixed(kind), console=False
        )
        reports.append(made.generate(PROMPTS, **given).report)
    ours, in_process = reports
    assert ours.completion_lengths == in_process.completion_lengths
    assert ours.drafted[kind] > 0
    if chunk is None:  # with the same features the same drafts, and the same of them accepted
        assert (ours.drafted, ours.accepted) == (in_process.drafted, in_process.accepted)
    else:
        share = ours.accepted[kind] / ours.drafted[kind]
        assert share == pytest.approx(in_process.accepted[kind] / in_process.drafted[kind], rel=0.1)


def test_new_weights_are_generated_with_and_speculators_follow(policy: Any, folder: Path) -> None:
    llm = engine(folder, max_num_seqs=16)
    made = AtlasRolloutEngine(model=llm, console=False)
    given: dict[str, Any] = {"max_new_tokens": 40, "eos_token_ids": [0], "num_generations": 4, "seed": 5}
    made.generate(PROMPTS, **given)
    moved = tiny_bigram(vocab=VOCAB, hidden=64, heads=2, kv_heads=2, layers=3, context=CONTEXT, logit_std=3.0, seed=9)
    exhausted = []

    def weights() -> Any:
        yield from moved.state_dict().items()
        exhausted.append(True)

    made.load_weights(weights())
    assert exhausted, "TRL unmerges adapters behind the last pair"
    assert made.policy_version == 1
    output = made.generate(PROMPTS, **given)
    expected = AtlasRolloutEngine(model=moved, speculation=False, console=False).generate(PROMPTS, **given)
    assert output.completion_ids == expected.completion_ids
    assert output.report.policy_version == 1
    assert output.report.sync_s > 0
    with pytest.raises(ValueError, match="policy's own weights"):
        AtlasRolloutEngine(model=moved, console=False).load_weights([])


class Silent(Stateless):
    """Asked for drafts, it has none."""

    name = "silent"

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        return Draft.empty(len(requests))


class Wrong(Stateless):
    """Drafts a token that the policy draws almost never: hits at first, on request."""

    name = "wrong"

    def __init__(self) -> None:
        self.lost = False
        self.truth: list[list[int]] = []

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        done = sequences.lengths[requests] - sequences.prompt_lengths[requests]
        known = [self.truth[r] if self.truth else [] for r in requests]
        tokens = [row[n] if n < len(row) else 0 for row, n in zip(known, done, strict=True)]
        drafted = (np.array(tokens, np.int64)[:, None] + self.lost) % VOCAB
        return Draft(drafted, np.minimum(max_draft_tokens, 1), np.full(drafted.shape, 0.5, np.float32))


class TestWarnings:
    """Each failure is provoked, and named in the report of the step that it happens in."""

    given = {"max_new_tokens": 40, "eos_token_ids": [0], "num_generations": 4, "seed": 1}  # noqa: RUF012

    def test_zero_drafts(self, llm: Any) -> None:
        made = AtlasRolloutEngine(model=llm, speculators=[Silent()], controller=_fixed("silent"), console=False)
        report = made.generate(PROMPTS, **self.given).report  # type: ignore[arg-type]
        assert any("silent: asked for drafts during the whole step and proposed none" in w for w in report.warnings)

    def test_collapsed_acceptance(self, llm: Any) -> None:
        drafter = Wrong()
        made = AtlasRolloutEngine(model=llm, speculators=[drafter], controller=_fixed("wrong"), console=False)
        drafter.truth = made.generate(PROMPTS, **self.given).completion_ids  # type: ignore[arg-type]
        assert not made.generate(PROMPTS, **self.given).report.warnings  # type: ignore[arg-type]
        drafter.lost = True
        few = made.generate(PROMPTS[:1], **{**self.given, "max_new_tokens": 12}).report  # type: ignore[arg-type]
        assert few.accepted_length == 1
        assert not few.warnings, "a few misses after an update are no collapse"
        report = made.generate(PROMPTS, **self.given).report  # type: ignore[arg-type]
        assert report.accepted_length == 1
        assert any("wrong: accepted length collapsed to 1.00" in warning for warning in report.warnings)

    def test_tensors_lost_between_calls(self, llm: Any) -> None:
        made = AtlasRolloutEngine(model=llm, console=False)
        for _ in range(2):
            made.generate(PROMPTS, **self.given)  # type: ignore[arg-type]
            made.policy_updated()
        assert not made.generate(PROMPTS, **self.given).report.warnings  # type: ignore[arg-type]
        drafter: Any = drafter_of(llm)
        with torch.no_grad():  # what sleep level 2 leaves of tensors in vLLM's memory pool
            for parameter in drafter.drafting.speculators["recurrent"].weights():
                parameter.zero_()
        report = made.generate(PROMPTS, **self.given).report  # type: ignore[arg-type]
        assert any("recurrent: its tensors changed between two calls" in warning for warning in report.warnings)

    def test_speculation_silently_disabled(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        made = AtlasRolloutEngine(model=llm, speculators=[RandomDrafter()], controller=_fixed("random"), console=False)
        monkeypatch.setattr(runner_of(llm), "take_draft_token_ids", lambda: None)
        report = made.generate(PROMPTS, **self.given).report  # type: ignore[arg-type]
        assert any("speculation is silently disabled" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"async_scheduling": True}, "async"),
        ({"additional_config": {"atlas_rl": {"draft_modell": "x"}}}, "did you mean 'draft_model'"),
    ],
    ids=str,
)
def test_engines_that_cannot_draft_say_what_to_change(arguments: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        engine(folder, **arguments)


def test_model_runner_v2_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        engine(folder)


def test_options_of_other_engines_are_refused(folder: Path, llm: Any) -> None:
    with pytest.raises(ValueError, match="invariant"):
        AtlasRolloutEngine(backend="vllm", verification="rejection")
    with pytest.raises(ValueError, match=r"engine\.attach"):
        AtlasRolloutEngine(backend="vllm", console=False)([], object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_p"):
        AtlasRolloutEngine(model=llm, console=False).generate(PROMPTS, max_new_tokens=2, eos_token_ids=[], min_p=0.1)
    plain = engine(folder, speculative_config=None)
    with pytest.raises(ValueError, match=r"engine\.prepare_vllm\(\)"):
        AtlasRolloutEngine(model=plain, console=False)


def test_traffic_without_an_engine_of_ours_is_learned_from(llm: Any) -> None:
    """As on a server: nobody announces calls, requests differ in how they sample, and some are cut off."""
    from vllm import SamplingParams as VllmParams

    drafter: Any = drafter_of(llm)
    fresh = engine(Path(llm.llm_engine.model_config.model), max_num_seqs=16)
    drafter = drafter_of(fresh)

    def ask(seed: int, temperature: float = 1.0, max_tokens: int = 50) -> list[list[int]]:
        params = VllmParams(
            temperature=temperature, max_tokens=max_tokens, seed=seed, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS * 4]
        return completions(fresh.generate(prompts, params, use_tqdm=False))

    first = [ask(seed) for seed in range(6)]
    report = drafter.take_report()
    assert report.num_requests == 6 * 24
    assert report.num_tokens == 6 * 24 * 50
    assert sum(report.accepted.values()) > 0
    assert drafter.drafting.speculators["recurrent"].refreshes, "the head learns between epochs"
    assert ask(7, temperature=0.0) == ask(8, temperature=0.0)
    assert drafter.policy_updated(None) == {"policy_version": 1}
    assert [ask(seed) for seed in range(6)] == first


@pytest.mark.parametrize("where", ["propose", "observe", "forward"])
def test_an_interrupted_call_leaves_nothing_behind(where: str, policy: Any, folder: Path) -> None:
    """Prompts in the prefix cache as well: what was scheduled and never run must not count as computed."""
    interrupted = engine(folder, max_num_seqs=8, enable_prefix_caching=True, block_size=32)
    given: dict[str, Any] = {"max_new_tokens": 40, "eos_token_ids": [0], "num_generations": 4}
    ours = AtlasRolloutEngine(
        model=interrupted, speculators=[RandomDrafter()], controller=_fixed("random"), console=False
    )
    plain = AtlasRolloutEngine(model=policy, speculation=False, console=False)
    for seed, after in enumerate((0, 1, 6)):
        thing = runner_of(interrupted).model if where == "forward" else ours._speculators["random"].unguarded
        undo = _interrupting(thing, where, after)
        with pytest.raises(KeyboardInterrupt):
            ours.generate(PROMPTS, seed=seed, **given)
        undo()
        assert not interrupted.llm_engine.has_unfinished_requests()
        assert drafter_of(interrupted).drafting.requests.table.sequences is None
        output = ours.generate(PROMPTS, seed=seed, **given)
        assert output.completion_ids == plain.generate(PROMPTS, seed=seed, **given).completion_ids
        assert not output.report.warnings
    assert not drafter_of(interrupted).drafting.requests._keys.keys() - set(runner_of(interrupted).requests)


def _interrupting(thing: Any, method: str, after: int) -> Any:
    original, calls = getattr(thing, method), iter(range(after))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    setattr(thing, method, interrupted)
    return lambda: delattr(thing, method)
