"""How many calls the interpreter makes between two forwards inside vLLM when nothing is drafted: exact, on any machine.

`benchmarks.vllm_host` times the same steps. The limit is what was counted when it was set, and some room for other versions
of numpy and numba.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import pytest

from atlas_rl.decode.compile_kernels import compile_kernels
from atlas_rl.vllm.settling import compile_settling
from benchmarks.vllm_host import PretendedEngine
from tests.models import tiny_llama

LIMIT = 180
_WARM_UP, _COUNTED = 120, 40


@pytest.fixture(scope="module")
def policy() -> Any:
    compile_kernels()
    compile_settling()
    return tiny_llama(vocab=2048, hidden=64, layers=1)


def calls(policy: Any, batch: int) -> float:
    """Median over steps without a draft; a trial now and then has some more."""
    engine = PretendedEngine(policy, batch, drafts=False)
    for _ in range(_WARM_UP):
        engine.step()
    step, counts = engine.drafting.step, []

    def counted(forward: Any) -> list[list[int]]:
        counts.append(0)

        def note(frame: Any, event: str, argument: Any) -> None:
            counts[-1] += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            return step(forward)
        finally:
            sys.setprofile(None)

    engine.drafting.step = counted  # type: ignore[method-assign]
    drafted = [engine.step()[2] for _ in range(_COUNTED)]
    plain = [count for count, tokens in zip(counts, drafted, strict=True) if not tokens]
    assert len(plain) > _COUNTED / 2
    return statistics.median(plain)


def test_a_step_without_a_draft_makes_few_calls_and_none_per_request(policy: Any) -> None:
    few, many = (calls(policy, batch) for batch in (8, 64))
    assert abs(few - many) <= 4, "what the controller looks up depends a little on the clock"
    assert max(few, many) <= LIMIT
