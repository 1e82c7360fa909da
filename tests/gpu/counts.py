"""What decode steps of an arm cost the host, by what a pretended GPU records."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from atlas_rl.decode import compile_kernels
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.speculators.fp4_self.copy import FourBitCopy
from tests.gpu.engines import ARMS, calls_before_drafts, engine_of, generate, num_drafted, policy
from tests.pretend_cuda import PretendCuda

STEP = ("step", "target")  # sections: all of a decode step but the policy's own forward, and that
_WAITS = ("sync", "d2h", "h2d")
_UPLOADS = ("h2d", "h2d_async")
_LAUNCHES = ("launch", "triton")


@dataclass(frozen=True, slots=True)
class Counts:
    """Per decode step in which every request drafts, the means of a call.

    Attributes:
        waits: Times that the host waits for the device.
        uploads: Copies to the device.
        launches: Kernels.
        beside: Of these, those that are not of the target's own forward.
        builds: Kernels compiled and attention plans made.
        num_plans: Attention plans of the call.
        table: Waits by place, to be shown.
    """

    waits: float
    uploads: float
    launches: float
    beside: float
    builds: float
    num_plans: int
    table: str


_SECTIONS = (
    (DecodeLoop, "step", "step"),
    (DecodeLoop, "forward", "target"),
    # Once per policy, in whatever step comes first; once per update.
    (InProcessRunner, "_look", "probe"),
    (FourBitCopy, "requantize", "requantize"),
)


def sectioned(cuda: PretendCuda) -> ExitStack:
    """Inside, events of a decode step are of the sections `STEP`."""
    stack = ExitStack()
    for owner, name, section in _SECTIONS:
        stack.enter_context(mock.patch.object(owner, name, cuda.sectioned(getattr(owner, name), section)))
    return stack


def counts_of(
    arm: str, *, model: Any = None, verification: str = "invariant", graphs: bool = False, **sampling: Any
) -> Counts:
    """Counts of a call in which no request ends early. What comes before is left out: admission, calls that only teach.

    And what happens once per drafter: without `graphs`, the first draft that would be captured is refused. The waits of
    captures are left out, too.
    """
    compile_kernels._compiled.clear()  # what was compiled on another pretended device is not on this one
    with PretendCuda(graphs=graphs) as cuda, sectioned(cuda):
        moved = cuda.move(policy(torch.bfloat16) if model is None else model)
        engine = engine_of(moved, ARMS[arm](cuda.move), verification=verification)
        options: dict[str, Any] = {"eos_token_ids": ()} | sampling
        calls = calls_before_drafts(arm) + (arm == "recurrent")
        if calls:
            generate(engine, calls, **options)
        cuda.events.clear()
        cuda.entered.clear()
        outputs = generate(engine, seed=7, **options)
        if arm not in ("plain", "history"):  # an index may know nothing that fits
            assert num_drafted(outputs) > 0, f"{arm} has not drafted"
        return _counted(cuda)


def _counted(cuda: PretendCuda) -> Counts:
    steps = cuda.entered["step"]

    def per_step(*kinds: str, section: Any = STEP) -> float:
        return cuda.count(*kinds, section=section) / steps

    plans = [event for event in cuda.of("build", section=STEP) if "attention" in event.what]
    waits = [event for event in cuda.of(*_WAITS, section=STEP) if "policy/captures.py" not in event.where]
    return Counts(
        len(waits) / steps, per_step(*_UPLOADS), per_step(*_LAUNCHES), per_step(*_LAUNCHES, section="step"),
        per_step("build"), len(plans), cuda.table(*_WAITS, section=STEP, per=steps),
    )  # fmt: skip
