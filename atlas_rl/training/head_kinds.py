"""The kinds of heads that `atlas-rl train-speculator` trains: their options, layers, settings and checkpoints."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.dflash.checkpoint import save_dflash
from atlas_rl.speculators.eagle3.checkpoint import save_eagle3
from atlas_rl.speculators.eagle3.config import check_layers, new_layers
from atlas_rl.training.dflash import NUM_LAYERS, DFlashSettings, default_dflash_layers, shape_for, train_dflash
from atlas_rl.training.eagle3 import TrainSettings, train
from atlas_rl.training.head_shape import head_config

_COMMON = ("intermediate_size", "epochs", "batch_size", "learning_rate", "seed")


class HeadKind(ABC):
    """One kind of head.

    Attributes:
        options: Options of the command that only this kind has; None where they are not given.
    """

    options: tuple[str, ...]

    @abstractmethod
    def layers(self, args: argparse.Namespace, num_layers: int) -> tuple[int, ...]:
        """Policy layers, of `num_layers`, whose inputs the head reads; `ValueError` if they cannot be read."""

    @abstractmethod
    def settings(self, args: argparse.Namespace, layers: tuple[int, ...], tokenizer: Any, vocab_size: int) -> Any:
        """Training settings from the command's options and the policy's tokenizer and vocabulary size.

        Raises:
            ValueError: An option is invalid. The policy is not loaded yet.
        """

    @abstractmethod
    def check_policy(self, policy: PolicyView, settings: Any) -> None:
        """Raise `ValueError` if no such head fits the policy."""

    @abstractmethod
    def train(
        self, policy: PolicyView, calls: Sequence[Path], work: Path, settings: Any, say: Callable[[str], None]
    ) -> Any:
        """Train a head; see `eagle3.train`."""

    @abstractmethod
    def save(self, folder: Path, head: Any, policy: PolicyView) -> None:
        """Write the head's checkpoint."""

    def given(self, args: argparse.Namespace) -> dict[str, Any]:
        """Options of this kind that were given, and those that all kinds have."""
        own = {name: getattr(args, name) for name in self.options if getattr(args, name) is not None}
        return own | {name: getattr(args, name) for name in _COMMON}


class _Eagle3(HeadKind):
    options = ("draft_vocab_size", "unroll")

    def layers(self, args: argparse.Namespace, num_layers: int) -> tuple[int, ...]:
        return new_layers(num_layers) if args.layers is None else check_layers(args.layers, num_layers, "--layers")

    def settings(
        self, args: argparse.Namespace, layers: tuple[int, ...], tokenizer: Any, vocab_size: int
    ) -> TrainSettings:
        return TrainSettings(layers=layers, **self.given(args))

    def check_policy(self, policy: PolicyView, settings: TrainSettings) -> None:
        head_config(policy, settings.layers, 1, settings.intermediate_size)

    def train(
        self, policy: PolicyView, calls: Sequence[Path], work: Path, settings: Any, say: Callable[[str], None]
    ) -> Any:
        return train(policy, calls, work, settings, say=say)

    def save(self, folder: Path, head: Any, policy: PolicyView) -> None:
        save_eagle3(folder, head, policy.model)


class _DFlash(HeadKind):
    options = ("num_layers", "block_size", "mask_token_id", "markov_rank")

    def layers(self, args: argparse.Namespace, num_layers: int) -> tuple[int, ...]:
        if num_layers < 2:
            raise ValueError("a DFlash head reads states between layers, and this policy has one layer: --kind eagle3")
        if args.layers is None:
            return default_dflash_layers(num_layers, args.num_layers or NUM_LAYERS)
        layers = check_layers(args.layers, num_layers, "--layers")
        if layers[0] == 0:
            raise ValueError("--layers names layer 0: a DFlash head reads inputs of layers from 1 on")
        return layers

    def settings(
        self, args: argparse.Namespace, layers: tuple[int, ...], tokenizer: Any, vocab_size: int
    ) -> DFlashSettings:
        if args.markov_rank is not None and args.markov_rank < 0:
            raise ValueError(f"--markov-rank must be at least 0, got {args.markov_rank}")
        if args.block_size == 1:
            raise ValueError("--block-size must be at least 2: a block of one token drafts nothing")
        token = _mask_token(args, tokenizer, vocab_size)
        if not 0 <= token < vocab_size:
            raise ValueError(f"--mask-token-id must be one of the policy's {vocab_size} tokens, got {token}")
        return DFlashSettings(layers=layers, **self.given(args) | {"mask_token_id": token})

    def check_policy(self, policy: PolicyView, settings: DFlashSettings) -> None:
        shape_for(policy, settings)

    def train(
        self, policy: PolicyView, calls: Sequence[Path], work: Path, settings: Any, say: Callable[[str], None]
    ) -> Any:
        return train_dflash(policy, calls, work, settings, say=say)

    def save(self, folder: Path, head: Any, policy: PolicyView) -> None:
        save_dflash(folder, head, policy.num_layers)


def _mask_token(args: argparse.Namespace, tokenizer: Any, vocab_size: int) -> int:
    """The given token; else the tokenizer's mask token, an embedding that no token uses, or the padding token."""
    unused = len(tokenizer) if len(tokenizer) < vocab_size else None
    for token in (args.mask_token_id, tokenizer.mask_token_id, unused, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "the tokenizer has neither a mask token nor a padding token, and the policy no unused embedding: name a token that "
        "texts hardly contain, --mask-token-id"
    )


KINDS: dict[str, HeadKind] = {"eagle3": _Eagle3(), "dflash": _DFlash()}
