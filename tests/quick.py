"""What `make quick` runs (`pytest --quick`): of every test that is not slow the first case, but for what is left out here.

A test that marks some of its cases as slow has chosen the others: they all run. `make test` runs everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

LEFT_OUT = (
    # Folders that load a trainer or vLLM, pretend a device, or start other programs.
    "benchmarks", "examples", "gpu", "integrations", "packaging", "training", "vllm",
    # Files that take longest. Other tests run each drafter and the engine that these are about.
    "audit/test_mixed_precision.py", "policy/test_compiled.py", "rollout/test_interrupts.py", "rollout/test_memory.py",
    "rollout/test_threads.py", "sampling/test_by_kernels.py", "speculators/test_fp4_self.py",
    "speculators/recurrent/test_heads.py",
)  # fmt: skip
"""Paths under `tests/`."""


def is_left_out(path: Path) -> bool:
    """Whether a folder or file of tests is none of the quick ones."""
    tests = Path(__file__).parent
    return any(path.is_relative_to(tests / name) for name in LEFT_OUT)


def quick_of(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The quick ones of these tests."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    quick: set[pytest.Item] = set()
    for own in cases.values():
        fast = [item for item in own if item.get_closest_marker("slow") is None]
        quick.update(fast if len(fast) < len(own) else fast[:1])
    return quick
