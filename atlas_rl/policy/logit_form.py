"""Finds out what a policy computes between its LM head's output and its logits.

Families scale it (Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, HyperCLOVA X multiplies by a
field of that same name, Falcon H1 has `lm_head_multiplier`) or squash it (Gemma 2, RecurrentGemma, xLSTM, each with a field
of its own). So no field is trusted: `after_head` runs the policy's forward with its body and head replaced, and
`fit_form` fits scale and softcap to the result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from atlas_rl.policy.compiled import uncompiled
from atlas_rl.policy.threads import replaced_forwards

logger = logging.getLogger(__name__)

_MAGNITUDES = (1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e5)
_TOLERANCE = 1e-3  # relative to a logit, plus the same in nats


@dataclass(frozen=True, slots=True)
class LogitForm:
    """Map from the LM head's output to logits, the same for every token.

    Attributes:
        scale: Factor on the head's output.
        softcap: Logits are squashed to `softcap * tanh(logit / softcap)` (Gemma 2, arXiv 2408.00118); None leaves them.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitForm:
        """A first guess from the usual fields of a transformers text configuration."""
        factor = float(getattr(config, "logit_scale", None) or 1.0)
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(factor / divisor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Logits from head outputs of any shape."""
        if self.scale != 1.0:
            products = products * self.scale
        return products if self.softcap is None else torch.tanh(products / self.softcap) * self.softcap


def probe_products(vocab_size: int) -> torch.Tensor:
    """Head outputs from tiny to huge, of either sign, as test inputs: float32 `[n, vocab]`, always the same."""
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.tensor(_MAGNITUDES, dtype=torch.float32, device="cpu")[:, None]
    uniforms = torch.rand(len(_MAGNITUDES), vocab_size, generator=generator, dtype=torch.float32, device="cpu")
    return magnitudes * (2 * uniforms - 1)


def fit_form(
    products: torch.Tensor, logits: torch.Tensor, guess: LogitForm, tolerance: float = _TOLERANCE
) -> tuple[LogitForm | None, bool]:
    """Fit the form to pairs of head outputs and logits, float32 `[n, vocab]` each.

    Args:
        products: Head outputs from tiny to huge, for the logits' tokens or for more (padding that a policy cuts off).
        logits: The policy's logits for them. Tokens that it masks in every row are ignored.
        guess: Preferred to fitted numbers, if it fits, because its numbers are exact.
        tolerance: Largest difference, relative to a logit and in nats.

    Returns:
        The form, None if there is none; and whether it holds for all tokens of `products`.
    """
    kept = (logits > -1e30).any(dim=0)  # -inf, or the least number of some format
    z, wanted = products[:, : logits.shape[1]][:, kept].double(), logits[:, kept].double()
    everywhere = bool(kept.all()) and logits.shape == products.shape
    for form in (guess, _fitted(z, wanted)):
        error = (form(z) - wanted).abs()
        if wanted.numel() and bool((error <= tolerance * (1 + wanted.abs())).all()):
            return form, everywhere
    return None, False


def _fitted(z: torch.Tensor, wanted: torch.Tensor) -> LogitForm:
    """Fit the scale to the smallest outputs, and a softcap to the largest if they are out of proportion."""
    size = z.abs()
    small = size <= size.flatten().kthvalue(max(1, size.numel() // 4)).values
    scale = float((z * wanted)[small].sum() / z[small].square().sum().clamp_min(1e-30))
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    capped = largest < 0.5 * abs(scale) * float(size.max())
    return LogitForm(scale, largest if capped and largest > 0 else None)


@torch.no_grad()
def after_head(model: Any, products: torch.Tensor) -> torch.Tensor:
    """Logits `[n, vocab]` that a policy's forward computes from LM head outputs `[n, vocab]`.

    The policy's own forward runs with body and head replaced, which leaves only the computation after the head. No
    weight is read, so this works while weights are sharded away. If the policy's code does not run like this, its
    configuration is used instead, with a warning.
    """
    body, head = model.base_model, model.get_output_embeddings()
    states = products.new_zeros(1, len(products), head.weight.shape[1])
    token_ids = torch.zeros(1, len(products), dtype=torch.int64, device=products.device)
    try:
        if body is model:
            raise AttributeError("no module of its own below the head")
        answers = {body: _answering(_BodyOutput((states,))), head: _answering(products[None])}
        with uncompiled(model), replaced_forwards(answers):
            logits: torch.Tensor = model(input_ids=token_ids, use_cache=False).logits
        if logits.ndim != 3 or logits.shape[:2] != token_ids.shape or logits.shape[2] > products.shape[1]:
            raise ValueError(f"its logits have the shape {list(logits.shape)}")
        return logits[0]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        logger.warning(
            "atlas_rl: cannot determine what %s makes of its LM head's output (%s): drafters follow its configuration "
            "instead",
            type(model).__name__,
            error,
        )
        return LogitForm.of(model.config.get_text_config())(products)


class _BodyOutput(tuple):
    """Output of a model body: the first element is the last hidden state, everything else is None."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def _answering(answer: Any) -> Callable[..., Any]:
    """A forward that always returns `answer`."""
    return lambda *args, **kwargs: answer
