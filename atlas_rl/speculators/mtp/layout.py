"""Maps the tensor names of layers for multi-token prediction (MTP) in checkpoints to one name for each part.

Three layouts are published. As in vLLM's readers (`qwen3_next_mtp.py`, `qwen3_5_mtp.py`, `deepseek_mtp.py`,
`glm4_moe_mtp.py`, `mimo_mtp.py`) and in transformers' `MtpModel`, all of them compute

    step    x = eh_proj(concat(enorm(embedding of token t + 1), hnorm(feature of position t)))
            feature = norm(block(x))        logits = LM head of the policy (feature)

where the feature of the first step is the input of the policy's own LM head, and later the output of the previous step.
`block` is one decoder layer of the policy's family with attention over all positions. Only MiMo has the feature first
in the concatenation. (vLLM zeroes the embedding of a text's second token; transformers does not, nor is it done here.)

    Qwen3-Next, Qwen3.5     mtp.fc, mtp.pre_fc_norm_embedding, mtp.pre_fc_norm_hidden, mtp.norm, mtp.layers.N.*
    DeepSeek-V3, GLM-4.x    model.layers.N.eh_proj, .enorm, .hnorm, .shared_head.norm, and the block beside them; N follows
                            the policy's last layer
    MiMo                    model.mtp_layers.N.input_proj, .token_layernorm, .hidden_layernorm, .final_layernorm, and the
                            block
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_DROPPED = "shared"  # copies of the policy's embedding or LM head: ignored for the policy's own, which are current


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of the parts of MTP layers in one kind of checkpoint.

    Attributes:
        feature_first: Whether the projection reads the feature before the embedding.
        layer: Matches a name that every layer has; captures the layer's number.
        parts: Patterns of names, without the prefix before the layer's own name, and our names; `%` is the layer's
            number. The first pattern that matches the beginning counts.
    """

    feature_first: bool
    layer: str
    parts: tuple[tuple[str, str], ...]


_LAYOUTS = (
    Layout(
        False,
        r"mtp\.layers\.(\d+)\.input_layernorm\.weight",
        (
            (r"mtp\.fc\.", "eh_proj."),
            (r"mtp\.pre_fc_norm_embedding\.", "enorm."),
            (r"mtp\.pre_fc_norm_hidden\.", "hnorm."),
            (r"mtp\.norm\.", "norm."),
            (r"mtp\.(embed_tokens|lm_head)\.", _DROPPED),
            (r"mtp\.layers\.%\.", "block."),
        ),
    ),
    Layout(
        False,
        r"layers\.(\d+)\.eh_proj\.weight",
        (
            (r"layers\.%\.eh_proj\.", "eh_proj."),
            (r"layers\.%\.enorm\.", "enorm."),
            (r"layers\.%\.hnorm\.", "hnorm."),
            (r"layers\.%\.shared_head\.norm\.", "norm."),
            (r"layers\.%\.(embed_tokens|shared_head\.head)\.", _DROPPED),
            (r"layers\.%\.", "block."),
        ),
    ),
    Layout(
        True,
        r"mtp_layers\.(\d+)\.input_proj\.weight",
        (
            (r"mtp_layers\.%\.input_proj\.", "eh_proj."),
            (r"mtp_layers\.%\.token_layernorm\.", "enorm."),
            (r"mtp_layers\.%\.hidden_layernorm\.", "hnorm."),
            (r"mtp_layers\.%\.final_layernorm\.", "norm."),
            (r"mtp_layers\.%\.", "block."),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """The first MTP layer of a checkpoint.

    Attributes:
        feature_first: See `Layout`.
        names: Our name of every tensor of the layer, by the checkpoint's.
        num_layers: Number of MTP layers in the checkpoint.
    """

    feature_first: bool
    names: dict[str, str]
    num_layers: int


def find_layer(names: Collection[str]) -> Found | None:
    """Find the first MTP layer among a checkpoint's tensors; None if there is none."""
    for layout in _LAYOUTS:
        numbers = {int(match[1]) for name in names if (match := re.fullmatch(rf"(?:\w+\.)*{layout.layer}", name))}
        if numbers:
            ours = _renamed(names, layout, min(numbers))
            return Found(layout.feature_first, ours, len(numbers))
    return None


def _renamed(names: Collection[str], layout: Layout, number: int) -> dict[str, str]:
    ours = {}
    for name in names:
        for pattern, own in layout.parts:
            match = re.match(rf"(?:model\.|language_model\.)*{pattern.replace('%', str(number))}", name)
            if match:
                if own != _DROPPED:
                    ours[name] = own + name[match.end() :]
                break
    return ours
