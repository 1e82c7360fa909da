"""Calls a causal LM's forward for the logits of selected positions, whatever its signature.

transformers' models take `logits_to_keep`, the positions whose logits are computed. A custom forward may lack it, name
it differently, or swallow it in `**kwargs` and return every row. The rows are then selected here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ForwardCall:
    """One way to run a policy: token ids and positions in, logits of the wanted positions out.

    Args:
        model: A causal LM. Only its signature is read.
        vocab_size: Number of tokens of its LM head.

    Attributes:
        keeps: Whether the forward computes wanted positions only. The signature may promise this wrongly, so the probe
            (`policy/probe.py`) checks it.

    Raises:
        ValueError: The forward takes no positions, so that rows of different lengths cannot be told apart.
    """

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._accepts = accepted_by(model.forward)
        self.keeps = self._accepts("logits_to_keep")
        for name in ("input_ids", "position_ids"):
            if not self._accepts(name):
                raise ValueError(
                    f"{type(model).__name__}.forward takes no {name}, without which rows of different lengths cannot be "
                    "run together: add the argument, or generate with the trainer's own engine"
                )

    def __call__(
        self, token_ids: torch.Tensor, position_ids: torch.Tensor | None, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Run tokens as one batch row.

        Args:
            token_ids: int64 `[num_tokens]`.
            position_ids: int64 `[num_tokens]`; None lets the model count.
            keep: int64 `[n]`, tokens whose logits are wanted; None for all.

        Returns:
            `[n, vocab]`, in the policy's own number format.

        Raises:
            ValueError: The forward did not return a row of logits for each position, or returned logits of more tokens
                than the LM head has.
        """
        logits = self.rows(token_ids, keep, position_ids)
        if logits.shape[-1] > self._vocab_size:
            raise ValueError(
                f"{type(self._model).__name__}.forward gives logits of {logits.shape[-1]} tokens, and its LM head knows "
                f"{self._vocab_size}: let it return those of the head, or call resize_token_embeddings({logits.shape[-1]})"
            )
        expected = len(token_ids) if keep is None or not self.keeps else len(keep)
        if logits.ndim != 3 or logits.shape[0] != 1 or logits.shape[1] != expected:
            raise ValueError(
                f"{type(self._model).__name__}.forward returned logits of shape {tuple(logits.shape)} where "
                f"[1, {expected}, vocab] was asked for: one row of logits per position is needed"
            )
        return logits[0] if keep is None or self.keeps else logits[0, keep]

    def rows(
        self, token_ids: torch.Tensor, keep: torch.Tensor | None, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The forward's unchecked logits for one batch row; -inf for tokens that it cuts off."""
        arguments: dict[str, Any] = {"input_ids": token_ids[None]}
        if position_ids is not None:
            arguments["position_ids"] = position_ids[None]
        if self._accepts("use_cache"):
            arguments["use_cache"] = False
        if keep is not None and self.keeps:
            arguments["logits_to_keep"] = keep
        return for_all_tokens(logits_of(self._model(**arguments)), self._vocab_size)


def accepted_by(forward: Callable[..., Any]) -> Callable[[str], bool]:
    """Whether a forward accepts a keyword, by its signature."""
    parameters = inspect.signature(forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return lambda name: anything or name in parameters


def for_all_tokens(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits of every token of the head; -inf for those that a forward cuts off (padding of a vocabulary)."""
    cut_off = vocab_size - logits.shape[-1]
    return nn.functional.pad(logits, (0, cut_off), value=float("-inf")) if cut_off > 0 else logits


def logits_of(output: Any) -> torch.Tensor:
    """The logits in the return value of a causal LM: an output object or a tuple."""
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits
