"""A vLLM engine of this process, drafting with our proposer, as `AtlasRolloutEngine` uses it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from atlas_rl.controller.base import Controller
from atlas_rl.core import Sequences
from atlas_rl.decode.propose import Proposing
from atlas_rl.report import dead_drafters as watch
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.speculators.base import Speculator
from atlas_rl.vllm import internals
from atlas_rl.vllm.checks import check_environment, check_sampling, speculative_config
from atlas_rl.vllm.lost_drafters import Watch
from atlas_rl.vllm.request_fields import EXTRA_KEY, EXTRA_REQUEST

if TYPE_CHECKING:
    from atlas_rl.vllm.proposer import AtlasProposer

_CPU_CACHE_BYTES = 2 << 30

NO_DRAFTER = (
    "this vLLM engine was built without our drafter. Build the trainer inside the engine, then attach:\n"
    "    with engine.prepare_vllm(): trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, ...))\n"
    "    engine.attach(trainer)"
)


def llm_arguments(draft_model: str | Path | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that make it draft with our proposer.

    Args:
        draft_model: Folder of an EAGLE-3 head, the static arm.
    """
    arguments: dict[str, Any] = {"speculative_config": speculative_config()}
    if draft_model is not None:
        arguments["additional_config"] = {"atlas_rl": {"draft_model": str(draft_model)}}
    return arguments


@contextmanager
def in_this_process() -> Iterator[None]:
    """Engines that are built inside run in this process, where their proposer can be reached."""
    internals.check_version()
    check_environment()
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    internals.tolerate_numba()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def build_llm(model: str | Path, draft_model: str | Path | None) -> Any:
    """A `vllm.LLM` of this process with our proposer and otherwise vLLM's defaults, but for its cache on a CPU.

    There vLLM would take nearly all memory of the machine. `VLLM_CPU_KVCACHE_SPACE` (GiB) sets another size.
    """
    with in_this_process():
        from vllm import LLM

        arguments = llm_arguments(draft_model)
        if not torch.cuda.is_available() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
        return LLM(model=str(model), logprobs_mode="processed_logprobs", **arguments)


class VllmRun:
    """One generation call: what the engine's report is made of.

    Attributes:
        logprobs: Per request, of its completion tokens, under the processed distribution.
        proposing: What speculators were asked for.
        no_speculation_forward_s: Estimated seconds of plain forwards for the same tokens.
        controller: The controller that planned.
        trace: Empty; vLLM's steps are not traced.
        num_planned: Draft tokens that were handed to vLLM.
    """

    def __init__(self, controller: Controller) -> None:
        self.logprobs: list[list[float]] = []
        self.proposing = Proposing({}, controller, StepRecorder())
        self.no_speculation_forward_s = 0.0
        self.controller = controller
        self.trace: list[dict[str, Any]] = []
        self.num_planned = 0


class VllmBackend:
    """Generates with one vLLM engine.

    Args:
        llm: A `vllm.LLM` of this process, built with `llm_arguments()`.

    Raises:
        ValueError: It drafts with something else, runs in another process, or returns other logprobs.
    """

    def __init__(self, llm: Any) -> None:
        drafter = internals.drafter_of(llm)
        if drafter is None:
            raise ValueError(NO_DRAFTER)
        config = llm.llm_engine.model_config
        if config.logprobs_mode != "processed_logprobs":
            raise ValueError(
                f"the engine returns {config.logprobs_mode}, not the logprobs of the sampled distribution: build it with "
                "logprobs_mode='processed_logprobs'"
            )
        self.llm = llm
        self.drafter: AtlasProposer = drafter  # type: ignore[assignment]
        self.drafter.prepare(defaults=False)  # an engine brings its own
        self._watch = Watch()
        self.dtype: torch.dtype = config.dtype
        self.vocab_size = int(config.get_vocab_size())
        self.max_context = int(config.max_model_len) - 1  # prompt plus completion fill the context, not one more
        rank, self.tensor_parallel_size, _ = internals.tensor_parallel()
        self.leads = rank == 0
        """Whether this rank drafts: one of every tensor-parallel group."""

    @property
    def model(self) -> Any:
        """The policy as drafters read it."""
        return self.drafter.policy

    def use(self, speculators: Mapping[str, Speculator], controller: Controller) -> None:
        """Draft with these."""
        self.drafter.use(dict(speculators), controller)

    def generate(
        self,
        sequences: Sequences,
        limits: np.ndarray,
        recorder: StepRecorder,
        controller: Controller,
        *,
        speculates: bool,
        extra: Mapping[str, Any],
    ) -> VllmRun:
        """Generate every request of a call; `sequences` is complete afterwards.

        Args:
            sequences: The requests, prompts in place.
            limits: int64 `[num_requests]`, tokens at which each ends.
            recorder: Gets counts and seconds.
            controller: Of the drafts.
            speculates: False decodes plainly; the tokens are the same.
            extra: Further sampling parameters of vLLM's.
        """
        check_sampling(sequences.sampling, extra)
        drafting, run = self.drafter.drafting, VllmRun(controller)
        self.check_drafters()
        drafting.begin(sequences, limits, recorder, speculates)
        prompts = [
            {"prompt_token_ids": sequences.token_ids[i, :n].tolist()} for i, n in enumerate(sequences.prompt_lengths)
        ]
        with recorder.generating():
            params = [self._params(sequences, limits, i, extra) for i in range(len(prompts))]
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        for request, output in enumerate(outputs):
            completion = output.outputs[0]
            begin, tokens = sequences.prompt_lengths[request], completion.token_ids
            sequences.token_ids[request, begin : begin + len(tokens)] = tokens
            sequences.lengths[request] = begin + len(tokens)
            run.logprobs.append(
                [entry[token].logprob for token, entry in zip(tokens, completion.logprobs, strict=True)]
            )
        run.proposing, run.num_planned = drafting.proposing, drafting.num_planned
        run.no_speculation_forward_s = drafting.no_speculation_forward_s
        drafting.end()
        self.remember_drafters()
        return run

    def check_drafters(self) -> None:
        """Before a call or a refresh: note drafters whose tensors have changed since `remember_drafters`."""
        self._watch.check(self.drafter.drafting.speculators)

    def remember_drafters(self) -> None:
        """The drafters are as they should be: whatever changes before the next call or refresh was not their doing."""
        self._watch.remember(self.drafter.drafting.speculators)

    def findings(self, recorder: StepRecorder, run: VllmRun) -> list[str]:
        """What is wrong with the drafters, in words that name the cause."""
        return [
            *watch.findings(recorder, run.proposing.num_asked, run.proposing.num_proposed),
            *self._watch.findings(recorder, run.num_planned),
        ]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """New policy weights, (name, tensor) as in a checkpoint; read to the end whatever happens."""
        internals.reload_weights(self.llm, weights)

    def _params(self, sequences: Sequences, limits: np.ndarray, request: int, extra: Mapping[str, Any]) -> Any:
        from vllm import SamplingParams

        sampling = sequences.sampling
        return SamplingParams(
            max_tokens=int(limits[request] - sequences.prompt_lengths[request]),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            stop_token_ids=list(sampling.eos_token_ids),
            ignore_eos=True,  # the ending tokens are the call's, not the tokenizer's
            logprobs=0,
            detokenize=False,
            extra_args={EXTRA_KEY: int(sequences.noise_keys[request]), EXTRA_REQUEST: request},
            **extra,
        )
