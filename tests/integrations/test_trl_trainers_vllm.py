"""Trainers other than GRPO and RLOO whose rollouts vLLM makes: what they train on is what it generated, at every step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from atlas_rl import AtlasRolloutEngine
from tests import vllm_engines  # first: it skips this module where there is no vLLM
from tests.other_trainers import Pair, build_other, trained_rows

__all__ = ["vllm_engines"]


@pytest.fixture(autouse=True)
def small_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes vLLM's defaults for a GPU: nothing of that is compiled or reserved for a policy of two layers."""
    from trl.generation import vllm_generation

    small = functools.partial(vllm_generation.LLM, enforce_eager=True, kv_cache_memory_bytes=64 << 20)
    monkeypatch.setattr(vllm_generation, "LLM", small)


def generated_rows(engine: AtlasRolloutEngine) -> list[list[Pair]]:
    """A list that gets every rollout but the reruns without speculation."""
    calls: list[list[Pair]] = []
    rollout = engine.rollout

    def kept(*args: Any, **kwargs: Any) -> Any:
        output = rollout(*args, **kwargs)
        if kwargs.get("speculation") is None:
            rows = zip(output.prompt_ids, output.completion_ids, strict=True)
            calls.append([(tuple(prompt), tuple(completion)) for prompt, completion in rows])
        return output

    engine.rollout = kept  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("kind", ["gmpo", "distillation", "sdft", "sdpo", "gold", "iw_opd"])
def test_vllm_generates_what_a_trainer_trains_on(kind: str, tmp_path: Path) -> None:
    engine = AtlasRolloutEngine(console=False)
    with engine.prepare_vllm(dtype="float32"):
        trainer = build_other(
            kind, tmp_path, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128, learning_rate=1e-2
        )
    trained = trained_rows(trainer)
    engine.attach(trainer, baseline_every=1)
    generated = generated_rows(engine)
    trainer.train()
    assert [sorted(rows) for rows in trained] == [sorted(rows) for rows in generated]
    assert [report.policy_version for report in engine.reports] == [0, 1]
    assert not any(report.warnings for report in engine.reports), "tokens must be the same without speculation"
    assert all(report.sync_s > 0 for report in engine.reports)
    assert sum(report.num_audited_tokens for report in engine.reports) > 0, "against the trainer's own policy"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gold", r"GOLDTrainer sets up other parts.*engine\.prepare_vllm\(\)"),
        ("online_dpo", "OnlineDPOTrainer has no vLLM"),
    ],
)
def test_vllm_that_cannot_be_put_in_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    trainer = build_other(kind, tmp_path)
    with pytest.raises(ValueError, match=message):
        AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
