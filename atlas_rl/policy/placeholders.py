"""Refuses prompts with placeholders for images, videos or sounds: in process a policy gets token ids only.

A processor inserts a special token where an image belongs, and the policy's forward puts the image's embeddings there.
Given token ids alone, the policy would silently treat the token as text.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_KINDS = {"image": "an image", "video": "a video", "audio": "sound"}
_FIELDS = tuple((kind, f"{kind}_token_{end}") for kind in _KINDS for end in ("id", "index"))


def refuse_placeholders(config: Any, token_ids: np.ndarray, lengths: np.ndarray) -> None:
    """Raise `ValueError` for prompts that contain one of the policy's placeholders.

    Args:
        config: The policy's own configuration, not that of its text part.
        token_ids: int `[prompts, tokens]`.
        lengths: int `[prompts]`, tokens of each.
    """
    given = np.arange(token_ids.shape[1]) < lengths[:, None]
    for kind, name in _FIELDS:
        token = getattr(config, name, None)
        if isinstance(token, int) and (rows := ((token_ids == token) & given).any(axis=1)).any():
            raise ValueError(
                f"request {int(rows.argmax())} has a place for {_KINDS[kind]} in its prompt (token {token}, the policy's "
                f"{name}): in process a policy is given text alone. Leave it out of the prompt, or generate with the "
                "trainer's own engine. If the policy drew it in an earlier turn, put it into "
                "generation_kwargs['suppress_tokens']"
            )
