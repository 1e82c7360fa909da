"""Describes drafters as models, so that the same roofline times a draft step; None is a free drafter."""

from __future__ import annotations

from dataclasses import replace

from atlas_rl.planner.model import ModelShape

DRAFTERS = ("eagle3", "mtp", "recurrent", "ngram", "draft-lm")
EAGLE3_VOCAB = 32_000  # vocabulary of the heads published with arXiv 2503.01840
RECURRENT_WIDTH, RECURRENT_VOCAB = 512, 4096


def drafter_model(kind: str, target: ModelShape, draft_lm: ModelShape | None = None) -> ModelShape | None:
    """The drafter called `kind` for `target`.

    Args:
        kind: One of `DRAFTERS`.
        target: The model that verifies.
        draft_lm: Counts of the draft LM, for `draft-lm` only.

    Returns:
        The drafter's counts; None for n-grams, whose search is assumed to cost nothing.

    Raises:
        ValueError: The kind is unknown, a draft LM is missing or superfluous, or the target has no prediction layers.
    """
    if (kind == "draft-lm") != (draft_lm is not None):
        raise ValueError("a draft LM needs both --drafter draft-lm and --draft-model with its config.json")
    if kind == "eagle3":
        return eagle3(target)
    if kind == "mtp":
        return mtp(target)
    if kind == "recurrent":
        return recurrent(target)
    if kind == "draft-lm":
        return draft_lm
    if kind == "ngram":
        return None
    raise ValueError(f"unknown drafter '{kind}': known are {', '.join(DRAFTERS)}")


def eagle3(target: ModelShape) -> ModelShape:
    """The EAGLE-3 head (arXiv 2503.01840): one dense layer over [embedding, hidden state], and a reduced vocabulary.

    Its attention reads twice the width, so its projections are about half as large again. Another projection maps the
    hidden states of three of the target's layers to the width of one.
    """
    hidden = target.hidden_size
    # No published head has latent attention: the target's own projections stand in for the head's.
    return replace(
        target,
        name="eagle3",
        num_dense_layers=1,
        num_moe_layers=0,
        num_local_layers=0,
        vocab_size=min(EAGLE3_VOCAB, target.vocab_size),
        tied=False,
        owns_embedding=False,
        attention_params=1.5 * target.attention_params + 3 * hidden * hidden,
        shared_params=0.0,
        expert_params=0.0,
        num_experts=0,
        experts_per_token=0,
        num_mtp_layers=0,
    )


def mtp(target: ModelShape) -> ModelShape:
    """The model's own layer for multi-token prediction (arXiv 2412.19437), applied once per draft token.

    It has one MoE layer, a projection from two widths to one, and the model's output matrix, which its memory counts
    again.

    Raises:
        ValueError: The target has no such layer.
    """
    if not target.num_mtp_layers:
        raise ValueError(f"this '{target.name}' model has no layer for multi-token prediction: use another --drafter")
    return replace(
        target,
        name="mtp",
        num_dense_layers=0,
        num_moe_layers=1,
        attention_params=target.attention_params + 2 * target.hidden_size * target.hidden_size,
        owns_embedding=False,
    )


def recurrent(target: ModelShape) -> ModelShape:
    """The head of `speculators/recurrent`: a GRU of width 512 on the target's hidden state, with a vocabulary of 4096."""
    width = RECURRENT_WIDTH
    return ModelShape(
        name="recurrent",
        hidden_size=width,
        num_dense_layers=1,
        num_moe_layers=0,
        vocab_size=min(RECURRENT_VOCAB, target.vocab_size),
        tied=False,
        owns_embedding=False,
        attention_params=2 * target.hidden_size * width,  # hidden state and embedding, projected to its width
        mlp_params=6 * width * width,
        kv_values_per_token=0,
        kv_splits=1,
        attention_flops_per_key=0.0,
    )
