"""Peak figures of GPUs with their sources, and the shares of the peaks that real code reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BYTES_PER_VALUE: Mapping[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "fp4": 0.5625,  # NVFP4: four bits, and one FP8 scale per 16 values
}
GB, TB = 1e9, 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: The value of `--gpu`.
        memory_bytes: Device memory.
        bandwidth_bytes_per_s: Peak bandwidth of that memory.
        flops_per_s: Peak dense operations per second by precision (a multiply-add is two). A missing precision has no
            matrix units: its weights are unpacked and multiplied at the next wider precision that has them.
        link_bytes_per_s: Peak bandwidth to the other GPUs of the node, per direction.
        source: Source of the figures.
    """

    name: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    link_bytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        rates = (self.memory_bytes, self.bandwidth_bytes_per_s, self.link_bytes_per_s, *self.flops_per_s.values())
        if not self.flops_per_s or min(rates) <= 0:
            raise ValueError(f"GPU '{self.name}': memory, bandwidth, operations and link must all be above zero")

    def peak_flops_per_s(self, precision: str) -> float:
        """Peak dense operations per second on weights of `precision`.

        Raises:
            ValueError: Neither `precision` nor a wider one has matrix units on this GPU.
        """
        wider = [name for name in BYTES_PER_VALUE if BYTES_PER_VALUE[name] >= BYTES_PER_VALUE[precision]]
        for name in reversed(wider):  # the narrowest precision that holds the values
            if name in self.flops_per_s:
                return self.flops_per_s[name]
        raise ValueError(f"GPU '{self.name}' has no figure for {precision}: it knows {', '.join(self.flops_per_s)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Shares of the peaks that code reaches, and fixed latencies: one set for all GPUs and models, fitted to none of them.

    `bandwidth_share` and `kernel_s` come from one measurement of Llama-3.2-1B (2.47 GB in BF16) on an H100
    (https://hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles): fused into a single kernel it reaches 78% of the
    bandwidth, while vLLM and SGLang reach at most 50% with about 100 kernels. The difference, (2.47 GB / 3.35 TB/s)
    (1/0.50 - 1/0.78) / 100 = 5.3 us, is the cost of a kernel's start and end inside a CUDA graph.

    Attributes:
        bandwidth_share: Share of the peak memory bandwidth.
        flops_share: Share of the peak operations: mean of the best matrix products measured on H200 and B200 in BF16 and
            FP8 (80.3, 77.6, 73.4 and 76.3%), https://github.com/stas00/ml-engineering (insights/when-to-upgrade-gpus).
        kernel_s: Seconds per kernel in which no weights move.
        all_reduce_s: Latency floor of an all-reduce: 5.7 us for 4 KB over eight H100,
            https://github.com/sgl-project/sglang/pull/2904.
        link_share: Share of the link's bandwidth, in large all-reduces: 77% measured over four H100,
            https://techfordev.netlify.app/articles/3789728.
        memory_share: Share of the device memory that weights and cache may fill; activations, graphs and the runtime need
            the rest. A convention (engines default to 0.85-0.95), not a measurement.
    """

    bandwidth_share: float = 0.78
    flops_share: float = 0.77
    kernel_s: float = 5.3e-6
    all_reduce_s: float = 5.7e-6
    link_share: float = 0.77
    memory_share: float = 0.95


MEASURED = Efficiency()
MAX_GPUS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """`num_gpus` of one kind in one node, working on each layer together (tensor parallelism)."""

    gpu: Gpu
    num_gpus: int = 1
    efficiency: Efficiency = MEASURED

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"--gpus must be at least 1, got {self.num_gpus}")
        if self.num_gpus > MAX_GPUS:
            raise ValueError(f"--gpus must be at most {MAX_GPUS:,}")


_GPUS = (
    Gpu(
        name="a100",
        memory_bytes=80 * GB,
        bandwidth_bytes_per_s=2.039 * TB,
        flops_per_s={"bf16": 312 * TB},
        link_bytes_per_s=300 * GB,
        source="https://www.nvidia.com/en-us/data-center/a100/ (80 GB SXM)",
    ),
    Gpu(
        name="h100",
        memory_bytes=80 * GB,
        bandwidth_bytes_per_s=3.35 * TB,
        flops_per_s={"bf16": 989 * TB, "fp8": 1979 * TB},
        link_bytes_per_s=450 * GB,
        source="https://www.nvidia.com/en-us/data-center/h100/ (SXM; operations without sparsity)",
    ),
    Gpu(
        name="h200",
        memory_bytes=141 * GB,
        bandwidth_bytes_per_s=4.8 * TB,
        flops_per_s={"bf16": 989 * TB, "fp8": 1979 * TB},
        link_bytes_per_s=450 * GB,
        source="https://www.nvidia.com/en-us/data-center/h200/ (SXM; operations without sparsity)",
    ),
    Gpu(
        name="b200",
        memory_bytes=180 * GB,
        bandwidth_bytes_per_s=8 * TB,
        flops_per_s={"bf16": 2250 * TB, "fp8": 4500 * TB, "fp4": 9000 * TB},
        link_bytes_per_s=900 * GB,
        source="https://docs.vultr.com/inference-cookbook/cuda/getting-started/hardware-overview (HGX B200); "
        "BF16: https://github.com/stas00/ml-engineering (insights/when-to-upgrade-gpus)",
    ),
    Gpu(
        name="gb200",
        memory_bytes=186 * GB,
        bandwidth_bytes_per_s=8 * TB,
        flops_per_s={"bf16": 2500 * TB, "fp8": 5000 * TB, "fp4": 10000 * TB},
        link_bytes_per_s=900 * GB,
        source="https://www.nvidia.com/en-us/data-center/gb200-nvl72/ (one GPU of 72; operations without sparsity)",
    ),
    Gpu(
        name="l40s",
        memory_bytes=48 * GB,
        bandwidth_bytes_per_s=0.864 * TB,
        flops_per_s={"bf16": 362 * TB, "fp8": 733 * TB},
        link_bytes_per_s=32 * GB,
        source="https://www.nvidia.com/en-us/data-center/l40s/ (PCIe 4.0 x16, no NVLink)",
    ),
    Gpu(
        name="rtx5090",
        memory_bytes=32 * GB,
        bandwidth_bytes_per_s=1.792 * TB,
        flops_per_s={"bf16": 209.5 * TB, "fp8": 419 * TB, "fp4": 1676 * TB},
        link_bytes_per_s=64 * GB,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf "
        "(operations without sparsity; PCIe 5.0 x16)",
    ),
)
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _GPUS}


def gpu_named(name: str) -> Gpu:
    """The GPU called `name`, in upper or lower case.

    Raises:
        ValueError: An unknown name; the message lists the known ones.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"unknown GPU '{name}': known are {', '.join(GPUS)}")
    return GPUS[name.lower()]
