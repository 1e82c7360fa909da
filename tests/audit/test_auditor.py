"""The audit: right samples pass, what is audited and at what price, and what the engine says of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_kernels.noise import Stream
from atlas_rl import AtlasRolloutEngine, SamplingParams
from atlas_rl.audit.auditor import Auditor
from atlas_rl.audit.scores import score
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy import ragged_attention, short_rows
from atlas_rl.report.sinks import console_line, console_warnings, trainer_metrics
from atlas_rl.sampling import verification
from atlas_rl.sampling.verification import RejectionSampling, choose
from atlas_rl.speculators.draft_lm import DraftLM
from tests.audit.audits import NEW, SETTINGS, asked, audit, sample
from tests.engines import VOCAB, policy
from tests.models import tiny_gpt2, tiny_llama


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("noise", [False, True])
def test_right_samples_pass(setting, noise):
    output = sample(**SETTINGS[setting])
    found = audit(output, asked(**SETTINGS[setting]), noise=noise, logprobs=True)
    assert found.findings == ()
    assert found.num_completions == len(output.completion_ids)
    assert found.scores.num_tokens == sum(map(len, output.completion_ids)) > 500
    assert found.scores.logprob_error_max_nats < 1e-4
    assert found.scores.num_known == (found.scores.num_tokens if noise or setting == "greedy" else 0)
    if setting == "greedy":
        assert found.scores.z is None
    else:
        assert abs(found.scores.z) < 4


def test_the_score_has_the_variance_that_is_claimed():
    """z of independent halves: mean 0, variance 1. With 160 of them, beyond 4.5 standard errors once in 10^5 seeds."""
    output = sample(num_generations=40)
    z = []
    for prompt, completion in zip(output.prompt_ids, output.completion_ids, strict=True):
        z.append(score(policy(), prompt, completion, asked()).z)
    assert abs(np.mean(z)) < 4.5 / np.sqrt(len(z))
    assert abs(np.var(z) - 1) < 4.5 * np.sqrt(2 / len(z))


def test_the_cost_is_bounded_by_the_share():
    auditor, spent, generated, audits = Auditor(0.05), 0, 0, 0
    output = sample(num_generations=5)
    longest = max(len(p) + len(c) for p, c in zip(output.prompt_ids, output.completion_ids, strict=True))
    for _ in range(40):
        forwarded = []
        handle = policy().register_forward_pre_hook(
            lambda module, args, kwargs, seen=forwarded: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        found = audit(output, asked(), auditor=auditor)
        handle.remove()
        spent += sum(forwarded)
        generated += sum(map(len, output.completion_ids))
        audits += found.num_completions > 0
        assert spent <= 0.05 * generated + longest
    assert audits > 20
    assert spent > 0.04 * generated


def test_which_rows_are_audited_does_not_depend_on_their_tokens():
    """The first pick of every call is the same for other tokens, and not the same in every call."""

    def picks(completions):
        auditor, rows = Auditor(1e-9), []
        for _ in range(10):
            auditor._credit_tokens = 1.0
            rows += list(auditor._rows([[1]] * 30, completions, asked()))
        return rows

    rng = np.random.default_rng(0)
    first, second = ([rng.integers(VOCAB, size=rng.integers(1, 20)).tolist() for _ in range(30)] for _ in range(2))
    assert picks(first) == picks(second)
    assert len(set(picks(first))) > 5


def test_a_share_of_nothing_audits_nothing():
    found = audit(sample(num_generations=1, temperature=2.0), asked(), auditor=Auditor(0.0))
    assert (found.num_completions, found.findings) == (0, ())


def test_long_completions_are_audited_at_every_second_position():
    model = tiny_gpt2(context=2200, seed=3)
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_new_tokens=2048)
    assert score(model, [1], rng.integers(VOCAB, size=2048).tolist(), sampling).num_tokens == 1024
    assert score(model, [1], rng.integers(VOCAB, size=21).tolist(), sampling).num_tokens == 11


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one prompt"):
        Auditor(1.0).audit(policy(), [[1]], [[2], [3]], asked())
    with pytest.raises(ValueError, match="logprobs"):
        Auditor(1.0).audit(policy(), [[1]], [[2]], asked(), logprobs=[])
    assert Auditor(1.0).audit(policy(), [[1]], [[]], asked()).scores.num_tokens == 0


def test_the_audit_leaves_the_policy_as_it_was():
    model = tiny_gpt2(seed=17)  # has dropout
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    first, second = (score(model, [1, 2], [3, 4, 5], asked()).score_nats for _ in range(2))
    assert first == second  # no dropout meanwhile
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


class RecoversFromTheWholeOfP(RejectionSampling):
    """A rejected draft is replaced by a draw from p, not from what is left of it."""

    def decide(self, positions, sampling):
        tokens, accepted = super().decide(positions, sampling)
        anew = choose(positions.probs, positions.keys, positions.indices, Stream.RECOVER, greedy=False)
        return np.where(accepted, tokens, anew), accepted


def test_the_engine_audits_by_default_and_says_so():
    engine = AtlasRolloutEngine(model=policy(), console=False)
    reports = [sample(engine=engine, seed=seed).report for seed in range(5)]
    assert not any(report.warnings for report in reports)
    assert reports[0].num_audited_tokens > 0
    audited, generated = (sum(getattr(r, n) for r in reports) for n in ("num_audited_tokens", "num_tokens"))
    assert 0 < audited < 0.01 * generated + NEW
    assert reports[0].audit_s > 0
    assert reports[0].audit_logprob_error_nats < 1e-4
    assert trainer_metrics(reports[0])["atlas/audit/num_tokens"] == reports[0].num_audited_tokens
    assert trainer_metrics(reports[0])["atlas/audit/z"] == reports[0].audit_z


def test_the_engine_does_not_audit_when_told_not_to():
    report = sample(engine=AtlasRolloutEngine(model=policy(), console=False, audit_share=0)).report
    assert (report.num_audited_tokens, report.audit_s, report.audit_z, report.audit_evidence_nats) == (0, 0, None, None)
    with pytest.raises(ValueError, match=r"audit_share must be in \[0, 1\]"):
        AtlasRolloutEngine(audit_share=1.5)


def test_a_biased_verification_is_warned_of_in_the_step(monkeypatch, capsys):
    monkeypatch.setitem(verification.VERIFIERS, "rejection", RecoversFromTheWholeOfP)
    drafter = DraftLM(tiny_llama(layers=1, seed=12), VOCAB)
    engine = AtlasRolloutEngine(
        model=policy(),
        speculators=[drafter],
        controller=FixedController([drafter.name], drafter.name, 3),
        verification="rejection",
        audit_share=1.0,
    )
    report = sample(engine=engine, num_generations=100).report
    assert any("audit: the sampled tokens are not drawn from the policy" in warning for warning in report.warnings)
    assert "audit:" in capsys.readouterr().out
    assert any(line.startswith("atlas warning: audit:") for line in console_warnings(report))
    assert "warning" in console_line(report)


def test_an_attention_that_forgets_is_warned_of_in_the_step(monkeypatch):
    """A fault of long contexts only, which the five tokens of the backend's own probe cannot see."""
    honest = ragged_attention.attend_rows

    def forgetful(*arguments, **options):
        *others, _ = arguments  # all but the window
        return honest(*others, 12, **options)

    for module in (ragged_attention, short_rows):
        monkeypatch.setattr(module, "attend_rows", forgetful)
    report = sample(engine=AtlasRolloutEngine(model=policy(), console=False, audit_share=0.2), num_generations=5).report
    assert any("not the policy's choice" in warning for warning in report.warnings)
    assert any("returned logprobs differ" in warning for warning in report.warnings)
