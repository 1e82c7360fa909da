"""Record a run once, replay it for any drafter: exactly, and without the policy.

Under drafter-invariant sampling the rollouts do not depend on what is drafted. So a recorded run (tokens, the policy's
hidden states, the embeddings of the tokens it used) answers for every drafter, draft length and controller how much would
have been accepted: the decode loop runs as it is, only that tokens come from the record. Time it takes from `Costs`, which
are fitted to a live run's trace.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from atlas_rl.controller.base import Controller, Step
from atlas_rl.controller.cost import CostModel, DraftCost
from atlas_rl.core import Draft, Hidden, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.decode.propose import Proposing
from atlas_rl.policy.base import Backend, Segments, Taps
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import StepReport
from atlas_rl.sampling.verification import Outcome, Verifier
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.reduced_vocab import TokenRows

_FORMAT = "atlas_rl.rollouts.1"


@dataclass(slots=True)
class Recorded:
    """One recorded generation call.

    Attributes:
        sequences: Every request, complete.
        last: float16 `[completion tokens, hidden]`, request by request: what each token was drawn from.
        layers: Per layer float16 `[all tokens but the last of each request, hidden]`, request by request.
        token_ids, inputs, outputs: Tokens whose embeddings the call or an earlier one used, `[tokens, hidden]` each.
        logit_options: What stands between the output embedding and the logits (`final_logit_softcapping` and kin).
    """

    sequences: Sequences
    last: torch.Tensor
    layers: dict[int, torch.Tensor]
    token_ids: np.ndarray
    inputs: torch.Tensor
    outputs: torch.Tensor
    logit_options: dict[str, float | None]

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        sequences = self.sequences
        arrays = {name: getattr(sequences, name) for name in _SEQUENCE_ARRAYS}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        tensors |= {"last": self.last, "inputs": self.inputs, "outputs": self.outputs}
        tensors |= {"row_token_ids": torch.from_numpy(self.token_ids)}
        tensors |= {f"layer.{layer}": states for layer, states in self.layers.items()}
        metadata = {
            "format": _FORMAT,
            "sampling": json.dumps(asdict(sequences.sampling)),
            "logit_options": json.dumps(self.logit_options),
            "vocab_size": str(sequences.vocab_size),
            "policy_version": str(sequences.policy_version),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Recorded:
        """Read what `save` wrote; `ValueError` for another file."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"'{path}' holds no recorded rollouts (format {metadata.get('format')!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        sampling = json.loads(metadata["sampling"])
        sampling["eos_token_ids"] = tuple(sampling["eos_token_ids"])
        sequences = Sequences(
            **{name: tensors[name].numpy() for name in _SEQUENCE_ARRAYS},
            sampling=SamplingParams(**sampling),
            vocab_size=int(metadata["vocab_size"]),
            policy_version=int(metadata["policy_version"]),
        )
        layers = {int(name[6:]): tensor for name, tensor in tensors.items() if name.startswith("layer.")}
        return cls(
            sequences,
            tensors["last"],
            layers,
            tensors["row_token_ids"].numpy(),
            tensors["inputs"],
            tensors["outputs"],
            json.loads(metadata["logit_options"]),
        )


_SEQUENCE_ARRAYS = ("token_ids", "lengths", "prompt_lengths", "prompt_keys", "noise_keys")
_LOGIT_OPTIONS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class RecordingSpeculator(Speculator):
    """Drafts nothing and writes every generation call to a folder, for `replay`.

        AtlasRolloutEngine(speculators=[HistorySpeculator(), RecurrentSpeculator(), RecordingSpeculator("runs/record")])

    A call is written when the policy moves on (`policy_updated`); calls that no update follows are not.

    Args:
        folder: Gets `call_0000.safetensors` and so on.
        layers: Decoder layers whose inputs to record: what an EAGLE-3 head reads.
        first_call: Number of the first call's file, to go on with a folder.
    """

    name = "recorder"
    reads_hidden = True

    def __init__(self, folder: str | Path, layers: Sequence[int] = (), first_call: int = 0) -> None:
        self.reads_layers = tuple(layers)
        self._folder = Path(folder)
        self._num_calls = first_call
        self._sequences: Sequences | None = None

    @property
    def ready(self) -> bool:
        """Never: it only watches."""
        return False

    def bind(self, policy: nn.Module) -> None:
        """Record the embeddings of this policy."""
        self._policy = policy
        vocab_size, hidden_size = policy.get_output_embeddings().weight.shape  # type: ignore[operator]
        self._rows = TokenRows.empty(vocab_size, hidden_size, policy.get_output_embeddings().weight.device)  # type: ignore[operator]

    def start(self, sequences: Sequences, requests: np.ndarray) -> None:
        """Note the prompts' tokens."""
        if sequences is not self._sequences:
            self._sequences = sequences
            self._last: list[list[torch.Tensor]] = [[] for _ in sequences.lengths]
            self._layers: dict[int, list[list[torch.Tensor]]] = {
                layer: [[] for _ in sequences.lengths] for layer in self.reads_layers
            }
            self._rows.reread(self._policy)
        for request in requests:
            self._rows.add(sequences.token_ids[request, : sequences.prompt_lengths[request]], self._policy)

    def read_prompts(self, sequences: Sequences, groups: list[np.ndarray], hidden: Hidden) -> None:
        """Keep the prompts' states."""
        for group, first in zip(groups, hidden.first, strict=True):
            for request in group:
                end = first + sequences.prompt_lengths[request]
                for layer, states in hidden.layers.items():
                    if layer in self._layers:
                        self._layers[layer][request].append(_half(states[first:end]))

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Nothing."""
        return Draft.empty(len(requests))

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Keep the states that the committed tokens were drawn from."""
        hidden = verified.hidden
        assert hidden is not None, "the loop hands over hidden states"
        assert hidden.last is not None, "and what the LM head reads"
        for row, request in enumerate(verified.requests):
            count, first = int(verified.num_committed[row]), int(hidden.first[row])
            begin = int(sequences.lengths[request]) - count
            self._last[request].append(_half(hidden.last[first : first + count]))
            if begin > sequences.prompt_lengths[request]:  # else the prompt's own states hold them already
                for layer, per_request in self._layers.items():
                    per_request[request].append(_half(hidden.layers[layer][first : first + count]))
            self._rows.add(verified.token_ids[row, :count], self._policy)

    def refresh(self, rollouts: Rollouts, policy_version: int) -> None:
        """Write the call that made `rollouts`."""
        sequences = rollouts.sequences
        if sequences is not self._sequences:
            return
        last = torch.cat([torch.cat(parts) for parts in self._last])
        layers = {layer: torch.cat([torch.cat(parts) for parts in rows]) for layer, rows in self._layers.items()}
        config = self._policy.config.get_text_config()  # type: ignore[operator, union-attr]
        options = {name: getattr(config, name, None) for name in _LOGIT_OPTIONS}
        rows = self._rows
        recorded = Recorded(sequences, last, layers, rows.token_ids, rows.inputs.cpu(), rows.outputs.cpu(), options)
        recorded.save(self._folder / f"call_{self._num_calls:04d}.safetensors")
        self._num_calls += 1
        self._sequences = None


def _half(states: torch.Tensor) -> torch.Tensor:
    """A float16 copy on the host; the residual stream of some families has entries beyond its range."""
    return states.detach().float().clamp(-65504, 65504).to("cpu", torch.float16, copy=True)


def recorded_calls(folder: str | Path) -> list[Path]:
    """The calls recorded in a folder, in their order; `ValueError` if there are none."""
    found = sorted(Path(folder).glob("call_*.safetensors"))
    if not found:
        raise ValueError(f"no recorded rollouts in '{folder}': record some with RecordingSpeculator('{folder}')")
    return found


class ReplayPolicy(nn.Module):
    """What speculators read of a policy: its embeddings, as far as the record holds them, and its configuration.

    Args:
        recorded: Any call of the run.
        like: The policy of the run, of any version: for tokens that the record does not know, which a drafter with a past of
            its own may. Without it their embeddings are zero.
    """

    def __init__(self, recorded: Recorded, like: nn.Module | None = None) -> None:
        super().__init__()
        vocab_size, hidden_size = recorded.sequences.vocab_size, recorded.inputs.shape[1]
        self._inputs, self._outputs = nn.Embedding(vocab_size, hidden_size), nn.Embedding(vocab_size, hidden_size)
        for own, name in ((self._inputs, "get_input_embeddings"), (self._outputs, "get_output_embeddings")):
            own.weight.data.zero_() if like is None else own.weight.data.copy_(getattr(like, name)().weight)
        # As many layers as were read: whoever reads more is told.
        num_layers = max(recorded.layers, default=-1) + 1
        options = SimpleNamespace(**recorded.logit_options, num_hidden_layers=num_layers)
        self.config = SimpleNamespace(get_text_config=lambda: options)
        self.follow(recorded)

    def follow(self, recorded: Recorded) -> None:
        """The policy as it was at this call."""
        index = torch.from_numpy(recorded.token_ids)
        with torch.no_grad():
            self._inputs.weight[index], self._outputs.weight[index] = recorded.inputs, recorded.outputs

    def get_input_embeddings(self) -> nn.Embedding:
        """As transformers' models have it."""
        return self._inputs

    def get_output_embeddings(self) -> nn.Embedding:
        """As transformers' models have it."""
        return self._outputs


def replay(
    recorded: Recorded,
    speculators: Mapping[str, Speculator],
    controller: Controller,
    costs: Costs | None = None,
) -> tuple[StepReport, Rollouts]:
    """Run the decode loop over a recorded call.

    Args:
        recorded: The call; the speculators must be bound to a `ReplayPolicy` that follows it.
        speculators: By name, in the controller's order.
        controller: Plans each step.
        costs: What forwards and drafts take. The controller is told these seconds and the report adds them up, prefill and
            sampling aside; without them both get those of the replay itself, which runs no policy.

    Returns:
        What the live run would have reported, but for entropies, and for times as said; and the rollouts, for the refreshes
        between calls, which are the caller's.
    """
    true = recorded.sequences
    token_ids = np.zeros_like(true.token_ids)
    for request, length in enumerate(true.prompt_lengths):
        token_ids[request, :length] = true.token_ids[request, :length]
    sequences = Sequences(
        token_ids, true.prompt_lengths.copy(), true.prompt_lengths, true.prompt_keys, true.noise_keys, true.sampling,
        true.vocab_size, true.policy_version,
    )  # fmt: skip
    clock: Any = _Clock() if costs else time.perf_counter
    recorder = StepRecorder(speculators=tuple(speculators), clock=clock)
    # A rollout that stopped by itself could have gone on: drafts reach as far as they did when it was made.
    stopped = true.sampling.ends(true.token_ids[np.arange(len(true.lengths)), true.lengths - 1])
    limits = np.minimum(true.prompt_lengths + true.sampling.max_new_tokens, true.token_ids.shape[1])
    limits = np.where(stopped, limits, true.lengths)
    loop = _ReplayLoop(
        _NoBackend(true.vocab_size), _FromRecord(true), speculators, controller, sequences, len(true.lengths), limits,
        recorder,
    )  # fmt: skip
    loop.play(recorded, costs, clock)
    loop.run()
    assert (sequences.lengths == true.lengths).all()
    report = recorder.finish(
        step=0,
        policy_version=true.policy_version,
        mode="standalone",
        num_prompt_tokens=int(true.prompt_lengths.sum()),
        completion_lengths=true.lengths - true.prompt_lengths,
    )
    return report, Rollouts(sequences)


@dataclass(slots=True)
class Costs:
    """What a machine takes for the policy's forwards and for drafts, as fitted to a live run.

    Attributes:
        forward: Of target forwards.
        drafts: Of each speculator's proposals.
    """

    forward: CostModel = field(default_factory=CostModel)
    drafts: dict[str, DraftCost] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Iterable[Mapping[str, Any]]) -> Costs:
        """From the lines of a controller's trace (`EngineConfig.trace`)."""
        costs = cls()
        for step in trace:
            slots = sum(step["admitted"].values())
            costs.forward.observe(step["batch"] + slots, step["forward_s"], step["context_tokens"])
            for name, asked in step["asked"].items():
                known = costs.drafts.setdefault(name, DraftCost())
                known.observe(asked["requests"], asked["depth"], asked["seconds"], asked.get("backlog", 0))
        return costs


class _Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class _PaidProposing(Proposing):
    """Drafts take what the costs say."""

    costs: Costs
    clock: _Clock

    def ask(self, name: str, sequences: Sequences, requests: np.ndarray, wanted: np.ndarray, step: Step) -> None:
        super().ask(name, sequences, requests, wanted, step)
        if wanted.any():
            known = self.costs.drafts[name]
            rows, depth = int((wanted > 0).sum()), float(wanted.max())
            step.draft_s[name] = known.predict(rows, depth, step.backlog[name])
            self.clock.now_s += step.draft_s[name]


class _ReplayLoop(DecodeLoop):
    """The decode loop, its forwards answered by the record."""

    def play(self, recorded: Recorded, costs: Costs | None, clock: Any) -> None:
        self._costs, self._clock = costs, clock
        completions = recorded.sequences.lengths - recorded.sequences.prompt_lengths
        self._recorded = recorded
        self._last_at = np.cumsum(completions) - completions - recorded.sequences.prompt_lengths
        lengths = recorded.sequences.lengths - 1
        self._layers_at = np.cumsum(lengths) - lengths
        if costs is not None:
            self.proposing = _PaidProposing(self.speculators, self.controller, self.recorder)
            self.proposing.costs, self.proposing.clock = costs, clock

    def _forward(self, requests: np.ndarray, draft: Draft) -> tuple[torch.Tensor, Hidden | None]:
        lengths, starts = draft.lengths + 1, self.sequences.lengths[requests]
        if self._costs is not None:
            num_tokens, context = int(lengths.sum()), int(starts.sum())
            table = self._costs.forward.predict(num_tokens, context)
            assert table is not None, "costs were fitted to forwards"
            self._clock.now_s += float(table[num_tokens])
        first = np.cumsum(lengths) - lengths
        row = np.repeat(np.arange(len(requests)), lengths)
        # Position of the token that is drawn; past the end of the rollout there is nothing, and nothing is read.
        drawn = starts[row] + np.arange(len(row)) - first[row]
        drawn = np.minimum(drawn, self._recorded.sequences.lengths[requests][row] - 1)
        return torch.empty(0), self._states(requests[row], drawn, first)

    def _prefill(self, leaders: np.ndarray, first_row: int) -> tuple[torch.Tensor, Hidden | None]:
        lengths = self.sequences.prompt_lengths[leaders]
        first = np.cumsum(lengths) - lengths
        hidden = self._states(leaders, lengths, first)
        row = np.repeat(np.arange(len(leaders)), lengths)
        index = torch.from_numpy(self._layers_at[leaders][row] + np.arange(len(row)) - first[row])
        hidden.layers = {layer: states[index].float() for layer, states in self._recorded.layers.items()}
        return torch.empty(len(leaders), 0), hidden

    def _states(self, requests: np.ndarray, drawn: np.ndarray, first: np.ndarray) -> Hidden:
        last = self._recorded.last[torch.from_numpy(self._last_at[requests] + drawn)].float()
        index = torch.from_numpy(self._layers_at[requests] + drawn - 1)
        layers = {layer: states[index].float() for layer, states in self._recorded.layers.items()}
        return Hidden(first, last, layers)


class _FromRecord(Verifier):
    """Commits what the record holds: a draft stands when it is that token, as under drafter-invariant sampling."""

    couples_noise = True

    def __init__(self, true: Sequences) -> None:
        self._true = true

    def decide(self, positions: Any, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError("a replay verifies whole drafts")

    def verify(self, logits: torch.Tensor, draft: Draft, sequences: Sequences, requests: np.ndarray) -> Outcome:
        true, width = self._true, int(draft.lengths.max(initial=0)) + 1
        column = sequences.lengths[requests][:, None] + np.arange(width)[None]
        inside = column < true.lengths[requests][:, None]
        tokens = true.token_ids[requests[:, None], np.where(inside, column, 0)].astype(np.int64)
        drafted = np.arange(width)[None] < draft.lengths[:, None]
        padded = np.pad(draft.token_ids[:, : width - 1], ((0, 0), (0, 1)))
        stands = drafted & inside & (padded == tokens)
        num_accepted = np.cumprod(stands, axis=1).sum(axis=1)
        nothing = np.zeros((len(requests), width), np.float32)
        return Outcome(tokens, num_accepted, nothing, nothing.copy(), nothing.copy())


class _NoBackend(Backend):
    """There is no policy to run; the loop only moves rows about."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.max_context = None

    def new_cache(self, num_rows: int, capacity: int) -> None:
        return None

    def session(self, cache: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, segments: Segments, keep: np.ndarray, taps: Taps | None = None) -> torch.Tensor:
        raise NotImplementedError("a replay runs no policy")

    def copy_rows(self, source: int, targets: Sequence[int], length: int) -> None:
        """Nothing to copy."""

    def row_bytes(self, capacity: int) -> int:
        return 0

    def free_bytes(self) -> int:
        return 0

    def synchronize(self) -> None:
        """Nothing to wait for."""
