"""What an engine refuses where ranks would have to make every generation call together, and cannot.

The trainers are real and in one process. They are told by name what spreads their policy over ranks.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atlas_rl import AtlasRolloutEngine
from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl import importance, together
from atlas_rl.integrations.trl.adapter import adapter_of
from atlas_rl.integrations.trl.importance import ImportanceCheck
from tests.models import tiny_llama
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer

PLAIN = SamplingParams(max_new_tokens=8)
TRUNCATED = SamplingParams(max_new_tokens=8, top_p=0.9)


def build(folder: Path, **options: Any) -> Any:
    model = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    return build_trainer("grpo", model, word_tokenizer(), folder, max_steps=1, **options)


def sharded(trainer: Any, wrapper: str) -> Any:
    trainer._dist.zero_stage = 3 if wrapper == "zero3" else 0
    trainer._dist.fsdp_version = int(wrapper[-1]) if wrapper.startswith("fsdp") else None
    return trainer


def refused(trainer: Any, message: str, backend: Any = "auto") -> None:
    """Attaching is refused; in process the first call of `rollout_func` is as well."""
    engine = AtlasRolloutEngine(console=False, backend=backend)
    with pytest.raises(ValueError, match=message):
        engine.attach(trainer)
    if backend == "auto":
        with pytest.raises(ValueError, match=message):
            engine(["a b c"], trainer)
    assert not trainer.use_vllm
    assert adapter_of(trainer) is None


def test_gathering_per_forward_is_refused(tmp_path: Path) -> None:
    trainer = sharded(build(tmp_path, ds3_gather_for_generation=False), "zero3")
    refused(trainer, "ds3_gather_for_generation=False gathers ZeRO-3's shards in every forward.*Leave it at True")
    trainer = sharded(build(tmp_path, ds3_gather_for_generation=False), "none")
    AtlasRolloutEngine(console=False).attach(trainer)  # nothing is sharded, so nothing is gathered


@pytest.mark.parametrize(("wrapper", "name"), [("zero3", "DeepSpeed ZeRO-3"), ("fsdp1", "FSDP1"), ("fsdp2", "FSDP2")])
def test_tools_with_a_sharded_policy_are_refused(wrapper: str, name: str, tmp_path: Path) -> None:
    trainer = sharded(build(tmp_path), wrapper)
    trainer.tools = [print]
    refused(trainer, f"with tools each rank makes as many generation calls.*{name} needs all")


@pytest.mark.parametrize(
    ("options", "wrapper", "message"),
    [
        (
            {"vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:9", "vllm_server_timeout": 1.0},
            "none",
            "with a server 2 ranks have to make every call together: train with one process",
        ),
        ({"vllm_tensor_parallel_size": 2}, "none", "2 ranks have to .*: set vllm_tensor_parallel_size=1"),
        (
            {"vllm_enable_sleep_mode": True},
            "zero3",
            "DeepSpeed ZeRO-3, which gathers .*: set vllm_enable_sleep_mode=False",
        ),
    ],
    ids=str,
)
def test_tools_with_a_vllm_that_ranks_call_together_are_refused(
    options: dict[str, Any], wrapper: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sharded(build(tmp_path, **options), wrapper)
    trainer.tools = [print]
    monkeypatch.setattr(trainer.accelerator.state, "num_processes", 2)
    refused(trainer, f"with tools each rank makes as many .*{message}", "vllm")


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_forwards_that_are_spread_over_ranks_are_refused(kind: str, tmp_path: Path) -> None:
    trainer = build(tmp_path)
    layout = SimpleNamespace(**{f"{kind}_enabled": True, f"{kind}_size": 2})
    trainer.accelerator.state.parallelism_config = layout
    try:
        refused(trainer, rf"parallelism \(parallelism_config, {kind}_size=2\) every forward")
    finally:
        trainer.accelerator.state.parallelism_config = None


def test_a_policy_loaded_in_parts_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.model._tp_size = 2
    refused(trainer, "loaded with tp_size=2")


def check_of_two_ranks(monkeypatch: pytest.MonkeyPatch, other: str) -> tuple[Any, ImportanceCheck]:
    """A check that has dropped the correction, on one of two ranks, of which the other says `other`."""
    accelerator = SimpleNamespace(num_processes=2, is_main_process=True)
    trainer = SimpleNamespace(
        vllm_importance_sampling_correction=True, use_vllm=True, temperature=1.0, accelerator=accelerator
    )
    check = ImportanceCheck(trainer, wanted=True)
    check._settle([importance.LogprobComparison(num_tokens=100, limit_nats=1.0)])
    assert not trainer.vllm_importance_sampling_correction
    monkeypatch.setattr(together, "gather_object", lambda own: [*own, (other, "")])
    return trainer, check


@pytest.mark.parametrize(("sampling", "other"), [(TRUNCATED, ""), (PLAIN, "its options have changed")])
def test_all_ranks_switch_the_correction_on_again(
    sampling: SamplingParams, other: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, check = check_of_two_ranks(monkeypatch, other)
    with caplog.at_level(logging.WARNING):
        check.begin_step(lambda: sampling)
    assert trainer.vllm_importance_sampling_correction
    assert "switched on again" in caplog.text


def test_no_rank_decides_alone_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, check = check_of_two_ranks(monkeypatch, "")
    check.begin_step(lambda: PLAIN)
    assert not trainer.vllm_importance_sampling_correction
    with pytest.raises(ValueError, match="ranks cannot decide together"):
        check.observe(trainer, TRUNCATED, trainer)
    assert not trainer.vllm_importance_sampling_correction
