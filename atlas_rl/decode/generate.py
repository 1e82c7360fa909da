"""The generation call, the interface of backends, and the backend that runs the policy in process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas_rl.checks import token_ids
from atlas_rl.controller.base import Controller
from atlas_rl.core import Sequences
from atlas_rl.decode.compile_kernels import compile_drafting, compile_verification
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.decode.plain_run import PlainForwards, plain_batches
from atlas_rl.decode.room import rows_to_fill
from atlas_rl.policy.captures import Captured
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.placeholders import refuse_placeholders
from atlas_rl.policy.unwrap import unwrap_policy
from atlas_rl.policy.view import InProcessView, PolicyView
from atlas_rl.report import dead_drafters
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.sampling.by_kernels import verifier_on
from atlas_rl.sampling.verification import Verifier
from atlas_rl.speculators.base import Speculator


@dataclass(frozen=True, slots=True)
class Call:
    """One generation call, checked and ready to run.

    Attributes:
        sequences: The requests, prompts in place; complete when the call has run.
        max_lengths: int64 `[num_requests]`, prompt plus completion tokens at which a request ends.
        speculators: By name, in the controller's order; empty decodes plainly, with the same tokens.
        controller: Plans every step.
        recorder: Receives counts and seconds.
        extra: Further sampling parameters, for backends that have more than `SamplingParams`.
    """

    sequences: Sequences
    max_lengths: np.ndarray
    speculators: Mapping[str, Speculator]
    controller: Controller
    recorder: StepRecorder
    extra: Mapping[str, Any] = field(default_factory=dict)

    def run_on(self, backend: Backend) -> CallResult:
        """Generate; however that ends, drafters then free the memory that they hold for this call.

        Raises:
            ValueError: As `Backend.generate`.
        """
        with ExitStack() as at_end:
            for speculator in self.speculators.values():
                at_end.callback(speculator.release)
            return backend.generate(self)


@dataclass(frozen=True, slots=True)
class CallResult:
    """Result of a call, beside the completed sequences.

    Attributes:
        logprobs: Per request, logprobs of its completion tokens under the processed distribution.
        plain: Forwards that the same tokens take without speculation.
        findings: Problems of the drafters, each with its cause.
        trace: The controller's record of every step, if it keeps one.
        draws_all: Whether positions after a rejected draft took the host's time for sampling, too. On a device a step's
            sampling costs its launches, however many positions there are.
    """

    logprobs: list[list[float]]
    plain: PlainForwards
    findings: list[str]
    trace: list[dict[str, Any]] = field(default_factory=list)
    draws_all: bool = False


class Backend(ABC):
    """Runs whole generation calls with one policy.

    Attributes:
        vocab_size: The policy's vocabulary.
        max_context: Longest sequence that the policy can be run over, tokens; None if it has no limit of its own.
        view: The policy as drafters read it.
        couples_noise: Whether drafters draw with the noise that also decides the policy's tokens.
        static_kinds: Static speculators that can draft here: `fp4`, `eagle3`, `dflash`, `mtp`, `draft_lm`.
        leads: Whether this rank drafts; in a tensor-parallel group one rank drafts for all.
        engine_dtype: Precision that it computes in, if that is not the policy's own.
    """

    vocab_size: int
    max_context: int | None
    view: PolicyView
    couples_noise: bool
    static_kinds: frozenset[str]
    leads: bool = True
    engine_dtype: torch.dtype | None = None

    @abstractmethod
    def runs(self, model: Any) -> bool:
        """Whether this backend runs `model`, or the model that `model` wraps."""

    @abstractmethod
    def generate(self, call: Call) -> CallResult:
        """Generate every request of a call. Engines use `Call.run_on`, which also ends the call of its drafters.

        Raises:
            ValueError: The call needs something that this backend cannot do; nothing has been generated then.
        """

    def current_vocab_size(self) -> int:
        """The policy's present vocabulary size; `vocab_size` is the size when the backend was made."""
        return self.vocab_size

    def moved(self) -> bool:
        """Whether the policy has moved to another device since the backend was made; drafters are then bound again."""
        return False

    @abstractmethod
    def eos_token_ids(self) -> list[int]:
        """Ending tokens that the policy's own configuration names; may be none."""

    @abstractmethod
    def audited(self, model: Any, policy: nn.Module | None) -> nn.Module | None:
        """The policy to audit against, as its trainer runs it, wrappers included; None disables the audit.

        Args:
            model: Model that the call was made with; `runs(model)` is true.
            policy: The policy in process, if the backend runs a copy of it.
        """

    def check_drafters(self, speculators: Mapping[str, Speculator]) -> None:
        """Before a refresh: note drafters whose weights changed without training since `remember_drafters`."""
        return

    def remember_drafters(self, speculators: Mapping[str, Speculator]) -> None:
        """After a refresh: remember the drafters' weights."""
        return

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load new policy weights, (name, tensor) as in a checkpoint; the iterator is exhausted even on errors.

        Raises:
            ValueError: The backend generates with the policy's own weights.
        """
        raise ValueError("this engine generates with the policy's own weights: call policy_updated()")


class InProcessBackend(Backend):
    """Generates with the trainer's own weights, in this process.

    Args:
        model: The policy, or a wrapper around it.
        verifier: Turns logits and drafts into tokens.
        max_batch_size: Most requests decoded together; None takes what memory allows.

    Raises:
        ValueError: Not a causal LM, or one whose attention cannot be run this way.
    """

    static_kinds = frozenset({"fp4", "eagle3", "dflash", "mtp", "draft_lm"})

    def __init__(self, model: nn.Module, verifier: Verifier, max_batch_size: int | None = None) -> None:
        self.runner = InProcessRunner(model)
        self.vocab_size, self.max_context = self.runner.vocab_size, self.runner.max_context
        self.view = InProcessView(self.runner.model)
        self._device = self.runner.device
        self.couples_noise = verifier.couples_noise
        self._verifier, self._max_batch_size = verifier, max_batch_size

    def runs(self, model: Any) -> bool:
        return self.runner.model is unwrap_policy(model)

    def current_vocab_size(self) -> int:
        weight = self.runner.model.get_output_embeddings().weight
        return int(weight.shape[0]) if weight.dim() == 2 and weight.numel() else self.vocab_size  # else sharded away

    def moved(self) -> bool:
        return self.runner.device != self._device

    def generate(self, call: Call) -> CallResult:
        runner = self.runner
        runner.check_reach(int(call.max_lengths.max()) - 1)  # the last token drawn is not run
        num_requests, sequences = len(call.max_lengths), call.sequences
        refuse_placeholders(runner.model.config, sequences.token_ids, sequences.prompt_lengths)
        num_rows = min(num_requests, self._max_batch_size or num_requests)
        cache = runner.new_cache(num_rows, sequences.max_length)
        runner.linears.purpose = call.recorder.speculates
        with runner.session(cache):
            verifier = verifier_on(runner.device, self._verifier)
            compile_verification(verifier, sequences.sampling, runner.vocab_size, runner.device)
            drafters = call.speculators.values()
            compile_drafting(drafters, sequences.sampling, runner.vocab_size, runner.device)
            loop = DecodeLoop(
                runner,
                verifier,
                call.speculators,
                call.controller,
                sequences,
                num_rows,
                call.max_lengths,
                call.recorder,
            )
            loop.run()
            plain = self._plain(loop)
        num_bytes = runner.linears.most_packed_bytes + runner.halves.most_bytes
        call.recorder.packed(runner.linears.packing_s, num_bytes)
        owners = [*call.speculators.values(), *([] if cache.steps is None else [cache.steps])]
        captured = Captured.of(owner.take_captured() for owner in owners)
        call.recorder.captured(captured.seconds, captured.num_bytes)
        asked = loop.proposing
        findings = dead_drafters.findings(call.recorder, asked.num_asked, asked.num_proposed)
        return CallResult(loop.logprobs, plain, list(findings), loop.trace)

    def _plain(self, loop: DecodeLoop) -> PlainForwards:
        """Forwards that the loop's tokens take without speculation, and the packing of weights for them."""
        num_tokens = loop.sequences.lengths - loop.sequences.prompt_lengths
        batches = plain_batches(num_tokens, loop.room.most_rows, rows_to_fill)
        plain = loop.plain_costs.run(batches)
        if plain.seconds is None:
            return plain
        return replace(plain, seconds=plain.seconds + self.runner.linears.beside_s(batches))

    def eos_token_ids(self) -> list[int]:
        return ending_tokens_of(getattr(self.runner.model, "generation_config", None))

    def audited(self, model: Any, policy: nn.Module | None) -> nn.Module | None:
        return model if isinstance(model, nn.Module) else self.runner.model


def ending_ids(given: Any, name: str = "eos_token_id") -> list[int]:
    """Ending tokens from transformers and TRL: one id, several or None; None and negative ids mean no ending token.

    Args:
        given: Ending tokens of a trainer, a configuration or a tokenizer.
        name: Its name there, for the message.

    Raises:
        ValueError: `given` is not token ids.
    """
    some = [token for token in given if token is not None] if isinstance(given, list | tuple) else given
    return [token for token in token_ids(name, [] if some is None else some) if token >= 0]


def ending_tokens_of(source: Any) -> list[int]:
    """`eos_token_id` of a configuration or a tokenizer; may be empty."""
    return ending_ids(getattr(source, "eos_token_id", None))
