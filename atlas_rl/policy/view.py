"""The parts of a policy that drafters read: both embedding tables, configuration, map from hidden state to logits.

All drafters read the same few parts, wherever the policy runs: in this process, inside vLLM, or in a recording.
`PolicyView` declares them once. The map from the LM head's input to the logits is declared only here:

    logits = form(head(state))      head: an affine map, rows and biases      form: a scale and a softcap, see `LogitForm`

Neither is read from a configuration alone, because families name and apply their scales differently. Views check the
form against the policy's own code (`atlas_rl/policy/logit_form.py`), and call the head module if it is more than a
linear layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from atlas_rl.policy.head import affine_rows, linear_of
from atlas_rl.policy.logit_form import LogitForm, after_head, fit_form, probe_products
from atlas_rl.policy.threads import evaluation_mode
from atlas_rl.policy.upload import uploaded


class PolicyView(ABC):
    """Interface to a policy for drafters.

    Weights may be read while a call runs, when they are whole on every rank. At a refresh they may be sharded away.

    Attributes:
        config: transformers' text configuration, or an object with the same fields.
        form: Map from the head's output to the logits; None if no form describes it. Only `logits` is right then, and
            drafters that learn later, from rows, cannot compute logits.
        model: The policy's own modules, for speculators that run them; None if they do not run in this process.
    """

    config: Any
    form: LogitForm | None
    model: Any = None

    @property
    @abstractmethod
    def input_table(self) -> torch.Tensor:
        """The input embedding's weight `[vocab, hidden]`, before any scale of the policy."""

    @property
    @abstractmethod
    def output_table(self) -> torch.Tensor:
        """The LM head's weight `[vocab, hidden]`, without bias and adapters, which `rows_of` and `logits` include."""

    @abstractmethod
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[..., hidden]` of int64 token ids, as the policy's first layer gets them."""

    @abstractmethod
    def output_rows(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `[n, hidden]` and biases `[n]` of the affine map that the LM head is, adapters included.

        Args:
            token_ids: int64 `[n]`.
        """

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the LM head."""
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
        """Device of the LM head."""
        return self.output_table.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the LM head."""
        return self.output_table.dtype

    def rows_of(self, token_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies for int64 `[n]` tokens: input and output rows, float32 `[n, hidden]` each, and biases, float32 `[n]`."""
        index = uploaded(token_ids, self.input_table.device)
        outputs, biases = self.output_rows(index.to(self.device))
        inputs = self.input_table.detach()[index]
        return inputs.float().clone(), outputs.detach().float().clone(), biases.detach().float().clone()

    def logits(self, states: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The policy's logits, float32 `[..., n]`, from inputs of its LM head.

        Args:
            states: `[..., hidden]`.
            token_ids: int64 `[n]`, tokens whose logits are wanted; None for all.
        """
        assert self.form is not None
        index = torch.arange(self.vocab_size, device=self.device) if token_ids is None else token_ids
        rows, biases = self.output_rows(index)
        return self.form(functional.linear(states.to(rows.dtype), rows, biases.to(rows.dtype)).float())


class InProcessView(PolicyView):
    """View of a transformers causal LM in this process.

    Args:
        model: The policy; read at every access, so that a view is never stale.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = self.model.config.get_text_config()

    @property
    def form(self) -> LogitForm | None:  # type: ignore[override]
        return self._fitted[0]

    @property
    def input_table(self) -> torch.Tensor:
        return self.model.get_input_embeddings().weight

    @property
    def output_table(self) -> torch.Tensor:
        return self._head.weight

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(token_ids)

    def output_rows(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with evaluation_mode(self._head):
            return affine_rows(self._head, token_ids)

    @torch.no_grad()
    def logits(self, states: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """As `PolicyView.logits`: by the policy's head module or, if no form describes it, by its own forward."""
        form, everywhere = self._fitted
        with evaluation_mode(self._head):
            if form is not None and token_ids is not None and linear_of(self._head) is not None:
                return super().logits(states, token_ids)
            products = self._head(states.to(self.dtype))
        if form is not None and (everywhere or token_ids is not None):
            return form((products if token_ids is None else products[..., token_ids]).float())
        flat = after_head(self.model, products.reshape(-1, products.shape[-1])).float()
        whole = flat.view(*products.shape[:-1], -1)
        return whole if token_ids is None else whole[..., token_ids]

    @property
    def _head(self) -> Any:
        return self.model.get_output_embeddings()

    @cached_property
    def _fitted(self) -> tuple[LogitForm | None, bool]:
        """The form, checked against the policy's own forward, and whether it holds for all tokens. Reads no weights."""
        products = probe_products(self.vocab_size)
        logits = after_head(self.model, products.to(self.device)).cpu().float()
        return fit_form(products, logits, LogitForm.of(self.config))
