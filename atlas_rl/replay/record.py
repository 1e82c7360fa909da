"""Records a run: tokens, the policy's hidden states, and the embeddings of the tokens used.

Rollouts under drafter-invariant sampling do not depend on the drafts, so one recording can be replayed for any drafter.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from atlas_rl.core import Draft, Needs, Prompts, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.policy.logit_form import LogitForm
from atlas_rl.policy.view import PolicyView
from atlas_rl.report.lost_writes import LostWrites, check_folder
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.reduced_vocab import TokenRows
from atlas_rl.whole_files import save_whole

if TYPE_CHECKING:
    from atlas_rl.policy.base import PolicyCache

logger = logging.getLogger(__name__)

_FORMAT = "atlas_rl.rollouts.3"  # 2 had no biases and no maximum length
_SEQUENCE_ARRAYS = ("token_ids", "lengths", "prompt_lengths", "prompt_keys", "noise_keys")


@dataclass(slots=True)
class Recorded:
    """One recorded generation call.

    Attributes:
        sequences: All requests, finished.
        head_inputs: float16 `[completion tokens, hidden]`, request by request: hidden state that each token was drawn from.
        layers: Per layer float16 `[all tokens but the last of each request, hidden]`, request by request.
        token_ids: int64 `[tokens]`, tokens used by this call or an earlier one; their embeddings follow.
        inputs, outputs: float32 `[tokens, hidden]`, input embeddings and rows of the LM head.
        biases: float32 `[tokens]`, biases of the LM head.
        form: How logits are computed from the LM head's output.
    """

    sequences: Sequences
    head_inputs: torch.Tensor
    layers: dict[int, torch.Tensor]
    token_ids: np.ndarray
    inputs: torch.Tensor
    outputs: torch.Tensor
    biases: torch.Tensor
    form: LogitForm

    def save(self, path: Path) -> None:
        """Write one safetensors file, either whole or not at all; `OSError` if the write fails."""
        sequences = self.sequences
        arrays = {name: getattr(sequences, name) for name in _SEQUENCE_ARRAYS}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        tensors |= {"last": self.head_inputs, "inputs": self.inputs, "outputs": self.outputs, "biases": self.biases}
        tensors |= {"row_token_ids": torch.from_numpy(self.token_ids)}
        tensors |= {f"layer.{layer}": states for layer, states in self.layers.items()}
        metadata = {
            "format": _FORMAT,
            "sampling": json.dumps(asdict(sequences.sampling)),
            "logit_form": json.dumps(asdict(self.form)),
            "vocab_size": str(sequences.vocab_size),
            "policy_version": str(sequences.policy_version),
            "max_length": str(sequences.max_length),
        }
        save_whole(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)

    @classmethod
    def load(cls, path: Path) -> Recorded:
        """Read a file written by `save`.

        Raises:
            ValueError: It is another file, or damaged.
            OSError: It cannot be opened.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise _damaged(path, error) from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"'{path}' holds no recorded rollouts (format {metadata.get('format')!r})")
        try:
            recorded = cls._of(tensors, metadata)
            fault = recorded._fault()
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path, error) from error
        if fault:
            raise _damaged(path, fault)
        return recorded

    @classmethod
    def _of(cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Recorded:
        sampling = json.loads(metadata["sampling"])
        sampling["eos_token_ids"] = tuple(sampling["eos_token_ids"])
        sequences = Sequences(
            **{name: tensors[name].numpy() for name in _SEQUENCE_ARRAYS},
            sampling=SamplingParams(**sampling),
            vocab_size=int(metadata["vocab_size"]),
            policy_version=int(metadata["policy_version"]),
            max_length=int(metadata["max_length"]),
        )
        layers = {int(name[6:]): tensor for name, tensor in tensors.items() if name.startswith("layer.")}
        return cls(
            sequences,
            tensors["last"],
            layers,
            tensors["row_token_ids"].numpy(),
            tensors["inputs"],
            tensors["outputs"],
            tensors["biases"],
            LogitForm(**json.loads(metadata["logit_form"])),
        )

    def _fault(self) -> str | None:
        """Which part has not the rows that it should have; readers find a request's rows by counting."""
        lengths, num_tokens = self.sequences.lengths, len(self.token_ids)
        ran = int((lengths - 1).sum())
        expected = {
            "the states that tokens were drawn from": (
                self.head_inputs,
                int((lengths - self.sequences.prompt_lengths).sum()),
            ),
            **{f"layer {layer}": (states, ran) for layer, states in self.layers.items()},
            "inputs": (self.inputs, num_tokens),
            "outputs": (self.outputs, num_tokens),
            "biases": (self.biases, num_tokens),
        }
        faults = (
            f"{name} has {len(part)} rows instead of {rows}"
            for name, (part, rows) in expected.items()
            if len(part) != rows
        )
        return next(faults, None)


class RecordingSpeculator(Speculator):
    """Drafts nothing and writes every generation call to a folder, for `replay`.

        AtlasRolloutEngine(speculators=[HistorySpeculator(), RecurrentSpeculator(), RecordingSpeculator("runs/record")])

    A call is written when the policy moves on (`policy_updated`); calls that no update follows are not. With `layers`,
    requests are left out whose prompt an engine did not run whole, because it found it in its prefix cache.

    Args:
        folder: Gets `call_0000.safetensors` and so on.
        layers: Decoder layers whose inputs to record, for an EAGLE-3 head to read.
        first_call: Number of the first call's file, to continue in a folder.

    Attributes:
        next_call: Number of the next call's file.
        lost: Calls that could not be written; a full disk ends a recording, not a training.

    Raises:
        ValueError: The folder cannot be written to.
    """

    name = "recorder"

    def __init__(self, folder: str | Path, layers: Sequence[int] = (), first_call: int = 0) -> None:
        self.needs = Needs(head_inputs=True, layers=tuple(layers))
        self._folder = Path(folder)
        self.lost = LostWrites()
        check_folder(self._folder, "folder")
        self.next_call = first_call
        self._sequences: Sequences | None = None

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Record the embeddings of this policy.

        Raises:
            ValueError: Its logits cannot be recomputed from what is recorded.
        """
        super().bind(policy, couples_noise)
        if policy.form is None:
            raise ValueError(
                "this policy's logits are not a scaled or capped output of its LM head: it cannot be recorded"
            )
        self._policy, self._form = policy, policy.form
        self._rows = TokenRows.empty(policy.vocab_size, policy.hidden_size, policy.device)

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """Record the prompts' tokens and keep their states."""
        if sequences is not self._sequences:
            self._sequences = sequences
            self._last: list[list[torch.Tensor]] = [[] for _ in sequences.lengths]
            self._layers: dict[int, list[list[torch.Tensor]]] = {
                layer: [[] for _ in sequences.lengths] for layer in self.needs.layers
            }
            self._rows.reread(self._policy)
        for request in requests:
            self._rows.add(sequences.token_ids[request, : sequences.prompt_lengths[request]], self._policy)
        for group, first in zip(prompts.groups, prompts.hidden.starts, strict=True):
            for request in group:
                end = first + sequences.prompt_lengths[request]
                for layer, per_request in self._layers.items():
                    per_request[request].append(_half(prompts.hidden.layers[layer][first:end]))

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        """None: it never drafts."""
        return None

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft nothing."""
        return Draft.empty(len(requests))

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Keep the states that the committed tokens were drawn from."""
        hidden = verified.hidden
        for row, request in enumerate(verified.requests):
            count, first = int(verified.num_committed[row]), int(hidden.starts[row])
            begin = int(sequences.lengths[request]) - count
            self._last[request].append(_half(hidden.head_inputs[first : first + count]))
            if begin > sequences.prompt_lengths[request]:  # else the prompt's states include them
                for layer, per_request in self._layers.items():
                    per_request[request].append(_half(hidden.layers[layer][first : first + count]))
            self._rows.add(verified.token_ids[row, :count], self._policy)

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Write the call that made `rollouts`."""
        sequences = rollouts.sequences
        if sequences is not self._sequences:
            return None
        self._sequences = None
        file = self.file_of(self.next_call)
        self.next_call += 1  # a lost call keeps its number, so that it can be told from the others
        whole = [request for request in range(len(sequences.lengths)) if self._has_all(sequences, request)]
        if len(whole) < len(sequences.lengths):
            logger.warning(
                "atlas_rl: '%s' is recorded with %d of %d requests: the states of the others are not complete. If vLLM "
                "found their prompts in its cache, record with enable_prefix_caching=False",
                file,
                len(whole),
                len(sequences.lengths),
            )
        if not whole:
            return None
        rows = self._rows
        recorded = Recorded(
            replace(sequences, **{name: getattr(sequences, name)[whole] for name in _SEQUENCE_ARRAYS}),
            _joined(self._last, whole),
            {layer: _joined(per_request, whole) for layer, per_request in self._layers.items()},
            rows.token_ids,
            *(rows.inputs.cpu(), rows.outputs.cpu(), rows.biases.cpu()),
            self._form,
        )
        with self.lost.tolerate("recorded call"):
            recorded.save(file)
        return None

    def _has_all(self, sequences: Sequences, request: int) -> bool:
        """Whether the states of all its tokens are there."""
        length, prompt = int(sequences.lengths[request]), int(sequences.prompt_lengths[request])
        return sum(map(len, self._last[request])) == length - prompt and all(
            sum(map(len, per_request[request])) == length - 1 for per_request in self._layers.values()
        )

    def file_of(self, call: int) -> Path:
        """File of a call, by its number."""
        return self._folder / f"call_{call:04d}.safetensors"


def _half(states: torch.Tensor) -> torch.Tensor:
    """Copy to float16 on the host, clipped: residual streams of some families exceed float16's range."""
    return states.detach().float().clamp(-65504, 65504).to("cpu", torch.float16, copy=True)


def _joined(per_request: Sequence[Sequence[torch.Tensor]], requests: Sequence[int]) -> torch.Tensor:
    return torch.cat([part for request in requests for part in per_request[request]])


def _damaged(path: Path, reason: object) -> ValueError:
    text = " ".join(str(reason).split())
    return ValueError(f"'{path}' is damaged ({text}): delete it, and record that call anew or do without it")


def recorded_calls(folder: str | Path) -> list[Path]:
    """The calls recorded in a folder, in order; `ValueError` if there are none."""
    files = {path.stem.removeprefix("call_"): path for path in Path(folder).glob("call_*.safetensors")}
    found = [files[number] for number in sorted(filter(str.isdecimal, files), key=int)]
    if not found:
        raise ValueError(f"no recorded rollouts in '{folder}': record some with RecordingSpeculator('{folder}')")
    return found
