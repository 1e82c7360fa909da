from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from atlas_rl.policy import in_process, varlen
from atlas_rl.policy.probe import Probed, probe
from tests.gpu.counts import sectioned
from tests.pretend_cuda import PretendCuda

pytest.importorskip("triton", reason="a policy on CUDA draws by kernels")

_PROBED: dict[Any, Probed] = {}


@pytest.fixture
def cuda() -> Iterator[PretendCuda]:
    """A pretended GPU whose events in a decode step are of the sections `STEP` (counts.py)."""
    with PretendCuda() as device, sectioned(device):
        yield device


@pytest.fixture
def probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies of one shape are probed once for all tests: a probe takes as long as the rest of a test."""

    def found(runner: Any) -> Probed:
        key = type(runner.model), runner.config.num_hidden_layers, runner.model.dtype, runner.device
        if key not in _PROBED:
            _PROBED[key] = probe(runner)
        return _PROBED[key]

    monkeypatch.setattr(in_process, "probe", found)


@pytest.fixture
def flash_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that steps are captured whose tokens can be compared to the bit: the operator is emulated, in any type."""
    monkeypatch.setattr(varlen, "_TYPES", (torch.float32, torch.bfloat16, torch.float16))
