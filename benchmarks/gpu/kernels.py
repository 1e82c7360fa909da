"""Times the Triton kernels on a device, beside the torch operations they replace and their memory-bandwidth floor."""

from __future__ import annotations

import time
from typing import Any

import torch

from atlas_kernels import noise, nvfp4
from atlas_kernels.noise import Stream
from atlas_kernels.rejection import verify_by_rejection
from atlas_kernels.truncate import truncate
from atlas_kernels.truncation import Truncation
from atlas_kernels.verify import verify
from benchmarks.gpu.timing import device_ms

VOCAB = 151_936


def copied_bytes_per_s() -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.randn(512 << 20, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * device_ms(lambda: target.copy_(source), repeats=10)["median"])


def rows() -> list[dict[str, Any]]:
    rate = copied_bytes_per_s()
    found: list[dict[str, Any]] = [{"kernel": "copy", "bytes_per_s": rate}]
    for count in (1, 8, 32, 128, 512):
        found += _verify_rows(count, rate)
        found += _truncate_rows(count, rate)
    for outputs, inputs in ((3072, 1024), (12288, 4096), (VOCAB, 1024)):
        for count in (1, 8, 32):
            found += _linear_rows(outputs, inputs, count, rate)
    return found


def _call(count: int) -> tuple[torch.Tensor, ...]:
    starts = torch.arange(0, count + 1, min(4, count), device="cuda")
    drafts = torch.randint(VOCAB, (count,), device="cuda")
    keys = torch.randint(2**62, (count,), device="cuda")
    return drafts, starts, keys, torch.arange(count, device="cuda") + 100


def _verify_rows(count: int, rate: float) -> list[dict[str, Any]]:
    logits = 4 * torch.randn(count, VOCAB, device="cuda")
    drafts, starts, keys, positions = _call(count)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        own = logits.to(dtype)
        floor_ms = 1e3 * own.nbytes / rate
        for name, call in (
            ("verify", lambda own=own: verify(own, drafts, starts, keys, positions, temperature=0.9)),
            ("verify greedy", lambda own=own: verify(own, drafts, starts, keys, positions, temperature=0)),
            (
                "verify_by_rejection",
                lambda own=own: verify_by_rejection(own, drafts, starts, keys, positions, temperature=0.9),
            ),
        ):
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            found.append(
                {
                    "kernel": name,
                    "rows": count,
                    "dtype": str(dtype).removeprefix("torch."),
                    "first_call_s": time.perf_counter() - began,
                    "ms": device_ms(call),
                    "floor_ms": floor_ms,
                }
            )

    def eager() -> torch.Tensor:
        probs = (logits / 0.9).softmax(-1)
        return (probs / noise.exponentials(keys, positions, Stream.TARGET, VOCAB)).argmax(-1)

    if count <= 128:
        found.append(
            {"kernel": "torch operations", "rows": count, "dtype": "float32", "ms": device_ms(eager, repeats=5)}
        )
    return found


TRUNCATIONS = {"top-p": Truncation(top_p=0.95), "top-k and top-p": Truncation(top_k=50, top_p=0.95)}


def _truncate_rows(count: int, rate: float) -> list[dict[str, Any]]:
    logits = 4 * torch.randn(count, VOCAB, device="cuda")
    found, out = [], torch.empty_like(logits)
    for name, truncation in TRUNCATIONS.items():
        ms = device_ms(lambda truncation=truncation: truncate(logits, truncation, temperature=0.9, out=out))
        found.append({"kernel": f"truncate, {name}", "rows": count, "ms": ms, "floor_ms": 2e3 * logits.nbytes / rate})
    return found


def _linear_rows(outputs: int, inputs: int, count: int, rate: float) -> list[dict[str, Any]]:
    # Several weights in turn: a single one would be read from the cache.
    copies = max(2, int(200e6 / (2 * outputs * inputs)))
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / 32 for _ in range(copies)]
    packed = [nvfp4.quantize(weight) for weight in weights]
    x = torch.randn(count, inputs, device="cuda", dtype=torch.bfloat16)
    plain = device_ms(lambda: [torch.nn.functional.linear(x, weight) for weight in weights])
    four_bit = device_ms(lambda: [nvfp4.linear(x, weight) for weight in packed])
    quantize = device_ms(lambda: nvfp4.quantize(weights[0], packed[0].tensor_scale))
    shape = {"outputs": outputs, "inputs": inputs, "rows": count}
    return [
        {
            "kernel": "nvfp4.linear",
            **shape,
            "ms": {k: v / copies for k, v in four_bit.items()},
            "bf16_linear_ms": {k: v / copies for k, v in plain.items()},
            "floor_ms": 1e3 * packed[0].num_bytes / rate,
            "bf16_floor_ms": 1e3 * weights[0].nbytes / rate,
        },
        {"kernel": "nvfp4.quantize", **shape, "ms": quantize, "floor_ms": 1e3 * 2.5625 * outputs * inputs / rate},
    ]
