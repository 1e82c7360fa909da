"""Measures registers, shared memory and spills of every Triton kernel, compiled ahead of time; needs Triton, no GPU.

python -m benchmarks.kernels_aot
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atlas_kernels import (
    draft_head_triton,
    draw_triton,
    layer_triton,
    nvfp4_triton,
    rejection_triton,
    truncate_triton,
    verify_triton,
)
from atlas_rl import progress
from benchmarks.common import ROOT, environment, write_result

RESULTS = ROOT / "benchmarks" / "results"
TARGETS = (90, 100)
_TYPES = {
    "b": "*bf16",
    "f": "*fp32",
    "d": "*fp64",
    "u": "*u8",
    "i": "*i32",
    "l": "*i64",
    "F": "fp32",
    "I": "i32",
    "L": "i64",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kernel with the arguments of a launch.

    Attributes:
        kernel: The `@triton.jit` function.
        types: One letter of `_TYPES` for each argument that is not constant, in order.
        constants: The constant arguments.
        num_warps: Warps per program.
        max_registers: Registers per thread that the launch was planned for.
    """

    kernel: Any
    types: str
    constants: dict[str, Any]
    num_warps: int
    max_registers: int


def _case(kernel: Any, types: str, num_warps: int, constants: dict[str, Any], **changed: Any) -> Case:
    # 168 registers for 128 threads: three programs fit on a multiprocessor, and hide each other's latency.
    max_registers = 168 if num_warps == 4 else 128
    return Case(
        kernel=kernel, types=types, constants=constants | changed, num_warps=num_warps, max_registers=max_registers
    )


def _draft_head(kernel: Any, types: str) -> Case:
    """bfloat16 weights, coupled draws at a temperature, with probabilities."""
    constants = draft_head_triton.TILE | {
        "ELEMENT": tl.bfloat16,
        "COMPUTE": tl.bfloat16,
        "STREAM": 0,
        "GREEDY": False,
        "SCALED": True,
        "WITH_PROBS": True,
        "SPLITS": draft_head_triton.SPLITS,
        "MOST_SPLITS": 512,
        "CHUNK": draft_head_triton.CHUNK,
        "CALLED": False,
    }
    own = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return _case(kernel, types, draft_head_triton.NUM_WARPS, own)


_MASKED = {"SCALED": True, "HAS_ALLOWED": True, "SPLITS": 128}
_CHOOSE = partial(
    _case,
    verify_triton.choose_splits,
    num_warps=verify_triton.NUM_WARPS,
    constants={
        "STREAM": 0,
        "GREEDY": 0,
        "SCALED": True,
        "HAS_ALLOWED": True,
        "EXCLUDE": 0,
        "BLOCKS": verify_triton.BLOCKS,
    },
)
_LINEAR = partial(
    _case,
    nvfp4_triton.linear_rows,
    "buufbIIII",
    nvfp4_triton.LINEAR_WARPS,
    dict(zip(("OUTPUTS", "ROWS", "GROUPS"), nvfp4_triton.LINEAR_TILE, strict=True)) | {"COMPUTE": tl.bfloat16},
)
CASES = {
    "verify.choose_splits": _CHOOSE("bulbllbdifFIIII"),
    "verify.choose_splits greedy": _CHOOSE("bulbllbdifFIIII", GREEDY=1, SCALED=False, HAS_ALLOWED=False),
    "verify.choose_splits mixed": _CHOOSE("bulblludifFIIII", GREEDY=2, SCALED=False, HAS_ALLOWED=False),
    "verify.finish": _case(verify_triton.finish, "difllllfffI", 1, {"SPLITS": 128}),
    "rejection.choose_splits": _CHOOSE("bulillbdifFIIII", STREAM=2, EXCLUDE=2),
    "rejection.residual_splits": _case(
        rejection_triton.residual_splits,
        "bulflllfdiFIIIII",
        rejection_triton.RESIDUAL_WARPS,
        _MASKED,
        STREAM=2,
        TILE=rejection_triton.RESIDUAL_TILE,
    ),
    "rejection.finish_rejection": _case(
        rejection_triton.finish_rejection,
        "budifdilfilllllfffFIIIIII",
        1,
        _MASKED,
        ACCEPT_STREAM=1,
        ONE_HOT=False,
        TILES=256,
    ),
    "draw.choose_among_splits": _case(
        draw_triton.choose_among_splits,
        "bllldifFILII",
        draw_triton.NUM_WARPS,
        {"STREAM": 0, "GREEDY": False, "SCALED": True, "TOKENS": draw_triton.TOKENS},
    ),
    "draw.finish_draw": _case(draw_triton.finish_draw, "diflfI", 1, {"SPLITS": draw_triton.SPLITS}),
    "truncate.truncate_rows": _case(
        truncate_triton.truncate_rows,
        "ffFIIIIII",
        truncate_triton.NUM_WARPS,
        {"SCALED": True, "TOP_K": True, "TOP_P": True, "MIN_P": True, "TOKENS": truncate_triton.TOKENS},
    ),
    "draft_head.advance": _draft_head(draft_head_triton.advance, "bbbfldiIIIIII"),
    "draft_head.score": _draft_head(draft_head_triton.score, "bblflldiffFIIIIIIIII"),
    "draft_head.finish_draft": _draft_head(draft_head_triton.finish_draft, "difflfIIIIII"),
    "draft_head.draft_whole": _draft_head(draft_head_triton.draft_whole, "bbbbblfllldifflfFIIIIII"),
    "nvfp4.quantize_weight": _case(
        nvfp4_triton.quantize_weight,
        "bfuuiIIIL",
        nvfp4_triton.QUANTIZE_WARPS,
        dict(zip(("ROWS", "GROUPS"), nvfp4_triton.QUANTIZE_TILE, strict=True)),
    ),
    "nvfp4.linear_rows": _LINEAR(NATIVE=""),
    "nvfp4.linear_rows native": _LINEAR(NATIVE="bf16"),
    "layer.norm_row": _case(
        layer_triton.norm_row,
        "bbbIF",
        layer_triton.NUM_WARPS,
        {"ADDS_ONE": False, "ROUNDS_FIRST": True, "COLUMNS": 4096},
    ),
    "layer.rotate_token": _case(
        layer_triton.rotate_token,
        "bbbbbbIII",
        layer_triton.NUM_WARPS,
        {"HEADS": layer_triton.HEADS, "HALF": 64, "ELEMENT": tl.bfloat16},
    ),
    "layer.gated_numbers": _case(
        layer_triton.gated_numbers, "bbbI", layer_triton.NUM_WARPS, {"SILU": True, "NUMBERS": layer_triton.NUMBERS}
    ),
    "layer.store_token": _case(
        layer_triton.store_token, "bbbbllIIII", layer_triton.NUM_WARPS, {"NUMBERS": layer_triton.NUMBERS}
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels_aot.json")
    args = parser.parse_args()
    cases = [(name, sm) for name in CASES for sm in TARGETS]
    rows = [compiled(name, sm) for name, sm in progress.each(cases, "kernels", "kernel")]
    print(f"{'kernel':<32} {'sm':>4} {'warps':>5} {'registers':>9} {'shared_bytes':>12} {'spill_bytes':>11}")
    for row in rows:
        print(
            f"{row['kernel']:<32} {row['sm']:>4} {row['num_warps']:>5} {row['registers']:>9} {row['shared_bytes']:>12} "
            f"{row['spill_bytes']:>11}"
        )
    payload = environment() | {"triton": triton.__version__, "rows": rows}
    print(f"written: {write_result(args.output, payload)}")


def compiled(name: str, sm: int) -> dict[str, Any]:
    """The result row of one case for one target, from `ptxas -v`.

    Raises:
        RuntimeError: Triton runs in its interpreter, or ptxas did not report the figures.
    """
    case = CASES[name]
    if not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    free = [argument for argument in case.kernel.arg_names if argument not in case.constants]
    signature = {argument: _TYPES[letter] for argument, letter in zip(free, case.types, strict=True)}
    source = ASTSource(
        case.kernel,
        signature | dict.fromkeys(case.constants, "constexpr"),
        constexprs=case.constants,
        attrs=_aligned(case),
    )
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # a cached kernel has no log
        kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": case.num_warps})
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas does not say what {name} uses:\n{log.getvalue()}")
    return {
        "kernel": name,
        "sm": sm,
        "num_warps": case.num_warps,
        "registers": int(registers[1]),
        "shared_bytes": int(kernel.metadata.shared),
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[248]\.", kernel.asm["ptx"])),
    }


def _aligned(case: Case) -> dict[tuple[int], list[list[Any]]]:
    """Arguments that launches treat as multiples of 16: pointers and sizes, except those without specialisation."""
    return {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in case.kernel.params
        if parameter.name not in case.constants
        and parameter.name != "temperature"
        and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    }


if __name__ == "__main__":
    main()
