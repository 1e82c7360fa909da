from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from atlas_rl.policy import in_process
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
