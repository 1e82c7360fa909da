"""What drafters read of a policy: its two embedding tables, its configuration, and the way from hidden state to logits.

Drafters of every kind read the same few things, wherever the policy runs: in this process, inside vLLM, or in a recording.
`PolicyView` declares them once. The way from the LM head's input to the logits is declared here and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class LogitForm:
    """What a policy makes of the product of hidden state and output embedding before it calls it a logit.

    Attributes:
        scale: Factor on the product (Cohere's `logit_scale`, Granite's `1 / logits_scaling`).
        softcap: Logits are squashed to `softcap * tanh(logit / softcap)` (Gemma 2, arXiv 2408.00118); None leaves them.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitForm:
        """As a transformers text configuration says."""
        factor = float(getattr(config, "logit_scale", None) or 1.0)
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(factor / divisor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Logits of products, any shape."""
        if self.scale != 1.0:
            products = products * self.scale
        return products if self.softcap is None else torch.tanh(products / self.softcap) * self.softcap


class PolicyView(ABC):
    """A policy as drafters read it.

    Weights may be read while a call runs, when they are whole on every rank. At a refresh they may be sharded away.

    Attributes:
        config: transformers' text configuration, or an object with the same fields.
        form: From products to logits.
        model: The policy's own modules, for speculators that run them; None where they do not run in this process.
    """

    config: Any
    form: LogitForm
    model: Any = None

    @property
    @abstractmethod
    def input_table(self) -> torch.Tensor:
        """The input embedding's weight `[vocab, hidden]`, before whatever scale the policy puts on it."""

    @property
    @abstractmethod
    def output_table(self) -> torch.Tensor:
        """The LM head's weight `[vocab, hidden]`."""

    @abstractmethod
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[..., hidden]` of int64 token ids, as the policy's first layer gets them."""

    @property
    def vocab_size(self) -> int:
        """Tokens that the LM head knows."""
        return int(self.output_table.shape[0])

    @property
    def hidden_size(self) -> int:
        """Size of the LM head's input."""
        return int(self.output_table.shape[1])

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Where the LM head lives."""
        return self.output_table.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the LM head."""
        return self.output_table.dtype

    def rows_of(self, token_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of both tables' rows of int64 `[n]` tokens: float32 `[n, hidden]` each."""
        index = torch.from_numpy(token_ids).to(self.input_table.device)
        return tuple(table.detach()[index].float().clone() for table in (self.input_table, self.output_table))  # type: ignore[return-value]

    def logits(self, states: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The policy's logits, float32 `[..., n]`, from inputs of its LM head.

        Args:
            states: `[..., hidden]`.
            token_ids: int64 `[n]`, tokens whose logits are wanted; None for all.
        """
        table = self.output_table.detach()
        rows = table if token_ids is None else table[token_ids]
        return self.form(functional.linear(states.to(table.dtype), rows).float())


class InProcessView(PolicyView):
    """A transformers causal LM of this process.

    Args:
        model: Read whenever something is asked for, so that a view never goes stale.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = self.model.config.get_text_config()
        self.form = LogitForm.of(self.config)

    @property
    def input_table(self) -> torch.Tensor:
        return self.model.get_input_embeddings().weight

    @property
    def output_table(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(token_ids)
