"""Compares the planner with published measurements.

A row holds the figures that its source states. If a source leaves out something that the planner needs, `assumed` names
the assumed value. The rows of one publication that have drafts calibrate the engines' hosts (`host.py`, which also says
why); all other rows are held out, and nothing is fitted to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from atlas_rl.planner.configs import CONFIGS
from atlas_rl.planner.drafters import drafter_model
from atlas_rl.planner.hardware import Machine, gpu_named
from atlas_rl.planner.host import ENGINES, Host
from atlas_rl.planner.model import parse_model
from atlas_rl.planner.roofline import Precision
from atlas_rl.planner.speculation import Setting, accepted_length, best_draft_tokens

EAGLE3 = "arXiv 2503.01840"
# Acceptance of a draft on MT-bench after 0, 1 and 2 drafts, read off figure 7; gives the accepted length of a chain.
_EAGLE3_ACCEPTANCE = (0.79, 0.79, 0.78)
TRTLLM = (
    "https://nvidia.github.io/TensorRT-LLM/blogs/tech_blog/"
    "blog1_Pushing_Latency_Boundaries_Optimizing_DeepSeek-R1_Performance_on_NVIDIA_B200_GPUs.html"
)
TRTLLM_LLAMA = (
    "https://developer.nvidia.com/blog/"
    "boost-llama-3-3-70b-inference-throughput-3x-with-nvidia-tensorrt-llm-speculative-decoding/"
)
ATLAS = "https://www.together.ai/blog/adaptive-learning-speculator-system-atlas"
GPUSTACK = "https://docs.gpustack.ai/latest/performance-lab/qwen3-8b/h100-latency"
NEMO_RL = "arXiv 2604.26779"
QWEN3_EAGLE3 = "https://huggingface.co/Tengyunw/qwen3_8b_eagle3"
EAGLE_PR = "https://github.com/SafeAILab/EAGLE/pull/173"

# Only rows of this publication calibrate the engines' hosts.
CALIBRATION = EAGLE3

Quantity = Literal["tokens/s", "ms/token", "speedup"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published figure and the setting it was measured in.

    Attributes:
        source: Paper or page.
        engine: Engine that ran it: a key of `host.ENGINES`.
        quantity: `tokens/s` of the whole batch, `ms/token` of one request, or `speedup` over no speculation.
        published: The figure, in the unit of `quantity`.
        model: A key of `CONFIGS`.
        gpu: A name of `hardware.GPUS`.
        num_gpus: GPUs in tensor parallel.
        precision: Precision of weights and cache.
        batch: Requests at once.
        context: Tokens cached per request, half of the output included.
        drafter: A kind of `drafters.DRAFTERS`; None without speculation.
        draft_tokens: Draft tokens per request and round.
        accepted: Tokens committed per request and round.
        accept: Acceptance of one draft, if the source gives neither `draft_tokens` nor `accepted`. The planner then
            takes the best draft length up to 16 and the resulting accepted length. None otherwise.
        assumed: Values that the source does not state.
    """

    source: str
    engine: str
    quantity: Quantity
    published: float
    model: str
    gpu: str
    num_gpus: int = 1
    precision: Precision
    batch: int = 1
    context: int
    drafter: str | None = None
    draft_tokens: int = 0
    accepted: float = 1.0
    accept: float | None = None
    assumed: str = ""

    @property
    def is_held_out(self) -> bool:
        """Whether nothing was fitted to this row's publication."""
        return not self.source.startswith(CALIBRATION)

    @property
    def setting(self) -> Setting:
        model = parse_model(CONFIGS[self.model])
        return Setting(
            model=model,
            machine=Machine(gpu=gpu_named(self.gpu), num_gpus=self.num_gpus),
            drafter=drafter_model(self.drafter, model) if self.drafter else None,
            precision=self.precision,
            context=self.context,
            host=ENGINES[self.engine],
        )

    def predicted(self, host: Host | None = None) -> float:
        """The planner's prediction, in the unit of `quantity`; `host` replaces the engine's own host if given."""
        setting, draft_tokens, accepted = self.setting, self.draft_tokens, self.accepted
        if host is not None:
            setting = replace(setting, host=host)
        if self.accept is not None:
            draft_tokens = best_draft_tokens(setting, self.batch, self.accept, 16)
            accepted = accepted_length(self.accept, draft_tokens)
        tokens_per_s = setting.tokens_per_s(self.batch, draft_tokens, accepted)
        if self.quantity == "speedup":
            return tokens_per_s / setting.tokens_per_s(self.batch, 0, 1.0)
        return tokens_per_s if self.quantity == "tokens/s" else 1e3 * self.batch / tokens_per_s

    def describe(self) -> str:
        """The setting in a few words."""
        gpus = f"{self.num_gpus}x {self.gpu.upper()}"
        if not self.drafter:
            drafts = "no speculation"
        elif self.accept is not None:
            drafts = f"{self.drafter}, best k"
        else:
            drafts = f"{self.drafter}, k={self.draft_tokens}"
        return f"{self.model}, {gpus}, {self.precision.mlp.upper()}, batch {self.batch}, {drafts}"


def chain_length(acceptance: Sequence[float]) -> float:
    """Tokens per round of a chain whose i-th draft is accepted with probability `acceptance[i]`, given all before it."""
    length = reach = 1.0
    for accept in acceptance:
        reach *= accept
        length += reach
    return length


_BF16 = Precision()
_FP8 = Precision(mlp="fp8", attention="fp8")
_FP4_EXPERTS = Precision(mlp="fp4")
# MT-bench conversations: some hundred tokens of prompt and answer.
_CHAT = 512

_deepseek = partial(Published, quantity="tokens/s", model="DeepSeek-V3", gpu="b200", context=2048)


def _eagle3_rows() -> list[Published]:
    sglang = {2: 1.81, 4: 1.82, 8: 1.62, 16: 1.48, 24: 1.39, 32: 1.32, 48: 1.38, 56: 1.34, 64: 1.38}
    vllm = {2: 1.75, 4: 1.68, 8: 1.58, 16: 1.49, 24: 1.42, 32: 1.36, 48: 1.21, 56: 1.01}
    llama = partial(Published, model="Llama-3.1-8B", precision=_BF16, context=_CHAT)
    plain = llama(
        source=f"{EAGLE3}, table 4 (SGLang)",
        engine="sglang",
        quantity="tokens/s",
        published=158.34,
        gpu="h100",
        assumed="context 512",
    )
    rows = [plain]
    for table, engine, gpu, length, curve in (
        ("3 (SGLang)", "sglang", "h100", 3, sglang),
        ("5 (vLLM)", "vllm", "a100", 2, vllm),
    ):
        speedup_at = partial(
            llama,
            source=f"{EAGLE3}, table {table}",
            engine=engine,
            quantity="speedup",
            gpu=gpu,
            drafter="eagle3",
            draft_tokens=length,
            accepted=chain_length(_EAGLE3_ACCEPTANCE[:length]),
            assumed="context 512; acceptance of figure 7",
        )
        rows += [speedup_at(batch=batch, published=speedup) for batch, speedup in curve.items()]
    return rows


def _trtllm_rows() -> list[Published]:
    mtp = {1: (1.92, 198.0), 2: (2.58, 250.0), 3: (2.82, 253.0), 4: (2.99, 245.0), 5: (3.01, 239.0)}
    plain = partial(_deepseek, source=TRTLLM, engine="tensorrt-llm", num_gpus=8, precision=_FP4_EXPERTS)
    return [
        plain(published=111.0),
        *(
            plain(published=tokens_per_s, drafter="mtp", draft_tokens=draft_tokens, accepted=accepted)
            for draft_tokens, (accepted, tokens_per_s) in mtp.items()
        ),
    ]


def _nemo_rows() -> list[Published]:
    lengths = {3: (3.32, 1.77), 5: (4.35, 1.44), 7: (5.06, 1.21)}
    return [
        Published(
            source=f"{NEMO_RL}, RL-Zero",
            engine="vllm",
            quantity="speedup",
            published=speedup,
            model="Qwen3-8B",
            gpu="gb200",
            precision=_BF16,
            batch=64,
            context=4096,
            drafter="eagle3",
            draft_tokens=draft_tokens,
            accepted=accepted,
            assumed="batch 64 and context 4096 on one GPU",
        )
        for draft_tokens, (accepted, speedup) in lengths.items()
    ]


def _atlas_rows() -> list[Published]:
    before = _deepseek(
        source=f"{ATLAS}: before",
        engine="together",
        published=105.0,
        num_gpus=4,
        precision=_FP8,
        assumed="FP8; context 2048",
    )
    adapted = _deepseek(
        source=f"{ATLAS}: fully adapted",
        engine="together",
        published=501.0,
        num_gpus=4,
        precision=_FP4_EXPERTS,
        drafter="eagle3",
        accept=0.9,
        assumed="acceptance 0.9 and an EAGLE-3 head: drafter and acceptance are not published; context 2048",
    )
    return [before, adapted]


def _plain_rows() -> list[Published]:
    """Single GPUs without speculation: every prediction of a speedup rests on these."""
    plain = partial(Published, context=_CHAT, assumed="context 512")
    measured: tuple[tuple[str, str, Quantity, float, str, str, Precision, int], ...] = (
        (f"{EAGLE_PR} (SGLang)", "sglang", "tokens/s", 156.0, "Llama-2-7B", "h100", _BF16, 1),
        (f"{QWEN3_EAGLE3} (SGLang)", "sglang", "tokens/s", 187.0, "Qwen3-8B", "h200", _BF16, 1),
        (f"{QWEN3_EAGLE3} (SGLang)", "sglang", "tokens/s", 90.0, "Qwen3-8B", "rtx5090", _BF16, 1),
        (f"{GPUSTACK} (SGLang)", "sglang", "ms/token", 7.14, "Qwen3-8B", "h100", _BF16, 4),
        (f"{GPUSTACK} (SGLang)", "sglang", "ms/token", 5.58, "Qwen3-8B", "h100", _FP8, 4),
        (TRTLLM_LLAMA, "tensorrt-llm", "tokens/s", 51.14, "Llama-3.3-70B", "h200", _FP8, 1),
    )
    names = ("source", "engine", "quantity", "published", "model", "gpu", "precision", "batch")
    return [plain(**dict(zip(names, row, strict=True))) for row in measured]  # type: ignore[arg-type]


def published_rows() -> list[Published]:
    """All rows, grouped by source."""
    return [*_plain_rows(), *_eagle3_rows(), *_trtllm_rows(), *_atlas_rows(), *_nemo_rows()]
