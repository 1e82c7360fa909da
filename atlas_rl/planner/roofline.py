"""Predicts seconds and bytes of one forward, and the memory that it needs.

The parts of a forward run one after the other. Each takes the longer of moving its bytes and doing its operations:

    t = sum over parts of max(bytes / (G B eta_b), operations / (G F eta_f))
        + 2 layers (t_ar + 2 (G-1)/G * n * hidden * 2 bytes / (L eta_l))     all-reduces, when G > 1
        + kernels * t_k                                                      starts and ends of kernels

with G GPUs, B their memory bandwidth [bytes/s], F their peak [operations/s], L their link [bytes/s], n the tokens of the
forward, and the shares eta and the latencies t_ar and t_k [s] of `Efficiency`.
"""

from __future__ import annotations

from dataclasses import dataclass

from atlas_rl.planner.hardware import BYTES_PER_VALUE, Machine
from atlas_rl.planner.model import ModelShape

# Kernels outside of the layers: embedding, last norm, output matrix, sampling. With four per attention and two per MLP
# (norms and activations fused into their neighbours) Llama-3.2-1B has 16 * 6 + 4 = 100, the count in `Efficiency`. Latent
# attention has nine, and an MoE layer router, top-k, two grouped products and the reduction, as listed in
# https://nvidia.github.io/TensorRT-LLM/blogs/tech_blog/blog1_Pushing_Latency_Boundaries_Optimizing_DeepSeek-R1_Performance_on_NVIDIA_B200_GPUs.html
KERNELS_OUTER = 4
KERNELS_MLP = 2
KERNELS_MOE = 5
KERNELS_SHARED_EXPERT = 2
_ACTIVATION_BYTES = 2  # all-reduces carry BF16


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Precision of MLPs and experts (`mlp`), of attention projections, and of the cache.

    Embedding and output matrix stay in BF16 (FP32 where the MLPs are), as in published FP8 and FP4 checkpoints.
    """

    mlp: str = "bf16"
    attention: str = "bf16"
    cache: str = "bf16"

    def __post_init__(self) -> None:
        for name in (self.mlp, self.attention, self.cache):
            if name not in BYTES_PER_VALUE:
                raise ValueError(f"unknown precision '{name}': known are {', '.join(BYTES_PER_VALUE)}")

    @property
    def head(self) -> str:
        return "fp32" if self.mlp == "fp32" else "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Bytes that one part of a forward moves on each GPU, and its operations (`flops`)."""

    name: str
    num_bytes: float
    flops: float
    precision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardCost:
    """Seconds of one forward, by cause; `num_bytes` and `flops` are per GPU."""

    num_bytes: float
    flops: float
    roofline_s: float
    communication_s: float
    launch_s: float

    @property
    def total_s(self) -> float:
        return self.roofline_s + self.communication_s + self.launch_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Memory in bytes per GPU; weights, cache and drafter may fill `usable_bytes`."""

    weights_bytes: float
    cache_bytes: float
    drafter_bytes: float
    usable_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.cache_bytes + self.drafter_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.usable_bytes


def forward(
    model: ModelShape, precision: Precision, machine: Machine, *, batch: int, tokens: int = 1, context: int
) -> ForwardCost:
    """Predict one forward over `tokens` new tokens of each of `batch` requests that have `context` tokens cached.

    Raises:
        ValueError: `batch` or `tokens` below 1, or `context` below 0.
    """
    if batch < 1 or tokens < 1 or context < 0:
        raise ValueError(f"batch and tokens must be at least 1 and context 0, got {batch}, {tokens} and {context}")
    gpu, share = machine.gpu, machine.efficiency
    bandwidth = gpu.bandwidth_bytes_per_s * share.bandwidth_share
    parts = _parts(model, precision, machine.num_gpus, batch, tokens, context)
    roofline_s = sum(
        max(part.num_bytes / bandwidth, part.flops / (gpu.peak_flops_per_s(part.precision) * share.flops_share))
        for part in parts
    )
    return ForwardCost(
        num_bytes=sum(part.num_bytes for part in parts),
        flops=sum(part.flops for part in parts),
        roofline_s=roofline_s,
        communication_s=_communication_s(model, machine, batch * tokens),
        launch_s=_kernels(model) * share.kernel_s,
    )


def memory(
    model: ModelShape,
    precision: Precision,
    machine: Machine,
    *,
    batch: int,
    context: int,
    drafter: ModelShape | None = None,
    drafter_precision: Precision | None = None,
) -> Memory:
    """Predict the memory of `batch` requests of `context` tokens: weights and cache of the model and of the drafter."""
    drafter_bytes = 0.0
    if drafter is not None:
        kept = drafter_precision or Precision()
        drafter_bytes = _weights_bytes(drafter, kept) / machine.num_gpus
        drafter_bytes += _cache_bytes(drafter, kept, machine.num_gpus, batch, context)
    return Memory(
        weights_bytes=_weights_bytes(model, precision) / machine.num_gpus,
        cache_bytes=_cache_bytes(model, precision, machine.num_gpus, batch, context),
        drafter_bytes=drafter_bytes,
        usable_bytes=machine.gpu.memory_bytes * machine.efficiency.memory_share,
    )


def _parts(model: ModelShape, precision: Precision, num_gpus: int, batch: int, tokens: int, context: int) -> list[Part]:
    num_tokens = batch * tokens
    layers = model.num_layers * model.attention_params
    dense = model.num_dense_layers * model.mlp_params
    shared = model.num_moe_layers * model.shared_params
    routed = model.num_moe_layers * model.expert_params
    # Each new token attends to the cache and to the new tokens before it; the cache is read once for all of them.
    cache_bytes = _cache_bytes(model, precision, num_gpus, batch, context + tokens)
    keys = model.cached_token_layers(context) + model.num_layers * (tokens + 1) / 2
    return [
        _linear("attention", layers, layers, precision.attention, num_tokens, num_gpus),
        Part(
            name="cache",
            num_bytes=cache_bytes,
            flops=num_tokens * keys * model.attention_flops_per_key / num_gpus,
            precision="fp32" if precision.head == "fp32" else "bf16",
        ),
        _linear("mlp", dense + shared, dense + shared, precision.mlp, num_tokens, num_gpus),
        _linear(
            "experts",
            routed * model.distinct_experts(num_tokens),
            routed * model.experts_per_token,
            precision.mlp,
            num_tokens,
            num_gpus,
        ),
        _linear("head", model.head_params, model.head_params, precision.head, num_tokens, num_gpus),
    ]


def _linear(name: str, read: float, used: float, precision: str, num_tokens: int, num_gpus: int) -> Part:
    """A part that moves `read` weights once, and multiplies each token with `used` of them."""
    return Part(
        name=name,
        num_bytes=read * BYTES_PER_VALUE[precision] / num_gpus,
        flops=2.0 * used * num_tokens / num_gpus,
        precision=precision,
    )


def _weights_bytes(model: ModelShape, precision: Precision) -> float:
    attention = model.num_layers * model.attention_params * BYTES_PER_VALUE[precision.attention]
    ends = (model.head_params + model.embedding_params) * BYTES_PER_VALUE[precision.head]
    rest = model.params - model.num_layers * model.attention_params - model.head_params - model.embedding_params
    return attention + ends + rest * BYTES_PER_VALUE[precision.mlp]


def _cache_bytes(model: ModelShape, precision: Precision, num_gpus: int, batch: int, context: int) -> float:
    # A latent cache cannot be cut by heads, so every GPU keeps and reads all of it. If there are fewer key-value heads than
    # GPUs, they are copied likewise.
    num_parts = min(num_gpus, model.kv_splits)
    return batch * model.cached_values(context) * BYTES_PER_VALUE[precision.cache] / num_parts


def _communication_s(model: ModelShape, machine: Machine, num_tokens: int) -> float:
    if machine.num_gpus == 1:
        return 0.0
    share, n = machine.efficiency, machine.num_gpus
    moved = 2 * (n - 1) / n * num_tokens * model.hidden_size * _ACTIVATION_BYTES
    each = share.all_reduce_s + moved / (machine.gpu.link_bytes_per_s * share.link_share)
    return 2 * model.num_layers * each


def _kernels(model: ModelShape) -> int:
    shared = KERNELS_SHARED_EXPERT if model.shared_params > model.hidden_size * model.num_experts else 0
    return (
        KERNELS_OUTER
        + model.num_layers * model.kernels_attention
        + model.num_dense_layers * KERNELS_MLP
        + model.num_moe_layers * (KERNELS_MOE + shared)
    )
