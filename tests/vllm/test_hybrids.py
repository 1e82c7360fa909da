"""Policies with recurrent layers are refused before they load, where vLLM would verify drafts with wrong states."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atlas_rl.vllm.internals import check_hybrid
from benchmarks.tiny_policies import build
from tests.vllm_engines import engine  # first: it skips this module where there is no vLLM

ON_CPUS = {
    "falcon_h1": "not known to roll back the recurrent layers of FalconH1ForCausalLM",
    "lfm2": "not known to roll back the recurrent layers of Lfm2ForCausalLM",
    "qwen3_next": "on CPUs vLLM does not roll back the recurrent layers of Qwen3NextForCausalLM",
}


@pytest.mark.parametrize("family", ON_CPUS)
def test_an_engine_with_our_proposer_is_refused_by_the_family(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=f"{ON_CPUS[family]}.*backend='in_process'"):
        engine(tmp_path)


def configured(architecture: str, device: str = "cuda", *, hybrid: bool = True) -> Any:
    """The fields of vLLM's configuration that are read; a real one for a GPU cannot be made without a GPU."""
    model = SimpleNamespace(architecture=architecture, is_hybrid=hybrid, is_attention_free=False)
    return SimpleNamespace(model_config=model, device_config=SimpleNamespace(device_type=device))


def installed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)


@pytest.mark.parametrize("architecture", ["Qwen3NextForCausalLM", "Qwen3_5ForConditionalGeneration"])
def test_gated_delta_rules_run_on_gpus_from_032_on(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("0.32.1", monkeypatch)
    check_hybrid(configured(architecture))
    installed("0.31.0", monkeypatch)
    with pytest.raises(ValueError, match=rf"vLLM 0\.31\.0 loses accepted drafts .*{architecture}.*install vLLM 0\.32"):
        check_hybrid(configured(architecture))


def test_other_recurrent_layers_are_refused_on_gpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    installed("0.32.0", monkeypatch)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM"):
        check_hybrid(configured("Lfm2ForCausalLM"))


def test_policies_without_recurrent_layers_are_not_affected(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.25.1", "0.32.0"):
        installed(version, monkeypatch)
        for device in ("cpu", "cuda"):
            # Granite 4 micro has only attention.
            check_hybrid(configured("GraniteMoeHybridForCausalLM", device, hybrid=False))
