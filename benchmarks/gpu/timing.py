"""Measures device time by events, and counts the host's requests to the device."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import quantiles

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def device_ms(call: Callable[[], Any], repeats: int = 30) -> dict[str, float]:
    """Device milliseconds of `call`, which must not synchronise: captured as a graph, so launches are not timed."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    marks = []
    for turn in range(repeats + 3):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        if turn >= 3:
            marks.append((began, ended))
    torch.cuda.synchronize()
    return quantiles([began.elapsed_time(ended) for began, ended in marks])


def host_ms(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds on the host's clock until the device has finished `call`."""
    seconds = []
    for turn in range(12):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if turn >= 2:  # the first two warm up
            seconds.append(time.perf_counter() - began)
    return quantiles([1e3 * s for s in seconds])


def traced(call: Callable[[], Any]) -> dict[str, Any]:
    """Host requests to the device in one call (launches, waits, copies), and the device's busy milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    kernels_us: Counter[str] = Counter()
    for event in profile.events():
        if event.name.startswith("cu"):
            counts[event.name] += 1
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels_us[event.name] += event.self_device_time_total
    return {
        "launches": sum(counts[name] for name in LAUNCHES),
        "graph_launches": counts["cudaGraphLaunch"],
        "waits": sum(counts[name] for name in WAITS),
        "copies": counts["cudaMemcpyAsync"],
        "device_busy_ms": sum(kernels_us.values()) / 1e3,
        "kernels_ms": {name[:90]: us / 1e3 for name, us in kernels_us.most_common(12)},
    }
