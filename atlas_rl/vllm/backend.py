"""A vLLM engine in this process that drafts with our proposer, for `AtlasRolloutEngine`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atlas_rl.decode.generate import Backend, Call, CallResult, ending_tokens_of
from atlas_rl.policy.logits import NonFiniteLogits
from atlas_rl.policy.threads import one_at_a_time
from atlas_rl.report import dead_drafters
from atlas_rl.speculators.base import Speculator
from atlas_rl.vllm import internals
from atlas_rl.vllm.checks import UNDEFINED_LOGITS, check_environment, check_sampling, speculative_config
from atlas_rl.vllm.graphs import with_graphs
from atlas_rl.vllm.lost_drafters import LostDrafters
from atlas_rl.vllm.request_fields import EXTRA_REQUEST

if TYPE_CHECKING:
    from atlas_rl.vllm.proposer import AtlasProposer

CPU_CACHE_BYTES = 2 << 30
"""Of an engine's cache on a CPU, where vLLM would take nearly all memory of the machine."""

NO_DRAFTER = (
    "this vLLM engine was built without our drafter. Build the trainer inside the engine, then attach:\n"
    "    with engine.prepare_vllm(): trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, ...))\n"
    "    engine.attach(trainer)"
)


def llm_arguments(draft_model: str | Path | None = None, **arguments: Any) -> dict[str, Any]:
    """Arguments for `vllm.LLM` to draft with our proposer and, on CUDA, to capture graphs of its steps.

    Args:
        draft_model: Folder of an EAGLE-3 or DFlash head, the static speculator.
        arguments: Further arguments of `vllm.LLM`. They take precedence: graphs follow `max_num_seqs`, and a given
            `compilation_config` is kept.
    """
    own: dict[str, Any] = {"speculative_config": speculative_config(), **arguments}
    if draft_model is not None:
        own["additional_config"] = {
            **(own.get("additional_config") or {}),
            "atlas_rl": {"draft_model": str(draft_model)},
        }
    return with_graphs(own)


@contextmanager
def in_this_process() -> Iterator[None]:
    """Context in which engines are built to run in this process, so that their proposer can be reached."""
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
    """A `vllm.LLM` in this process with our proposer and vLLM's defaults, except for its cache on a CPU.

    vLLM's default would take nearly all memory of the machine there. `VLLM_CPU_KVCACHE_SPACE` (GiB) sets another size.
    """
    with in_this_process():
        from vllm import LLM

        arguments = llm_arguments(draft_model)
        if not torch.cuda.is_available() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        return LLM(model=str(model), logprobs_mode="processed_logprobs", **arguments)


class VllmBackend(Backend):
    """Generates with one vLLM engine.

    Args:
        llm: A `vllm.LLM` of this process, built with `llm_arguments()`.

    Raises:
        ValueError: The engine drafts with another method, runs in another process, or returns other logprobs.
    """

    couples_noise = True
    static_kinds = frozenset({"eagle3", "dflash"})

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
        self.drafter.prepare(defaults=False)  # the engine brings its own speculators
        assert self.drafter.policy is not None, "prepared"
        self.view = self.drafter.policy
        self.engine_dtype = config.dtype
        self.vocab_size = int(config.get_vocab_size())
        self.max_context = int(config.max_model_len) - 1  # prompt and completion together fill the context
        rank, self.tensor_parallel_size, _ = internals.tensor_parallel()
        self.leads = rank == 0
        self._lost = LostDrafters()

    def runs(self, model: Any) -> bool:
        return self is model or self.llm is model or isinstance(model, str | Path)

    @one_at_a_time
    def generate(self, call: Call) -> CallResult:
        if not self.drafter.weights_are_whole:
            raise ValueError(
                "loading weights failed when some had changed: load the policy's weights once more before generating"
            )
        check_sampling(call.sequences.sampling, call.extra)
        if call.speculators:
            self.check_drafters(call.speculators)
        ticket = self.drafter.drafting.begin(call)
        try:
            run = self._run(call, ticket)
        finally:
            # After an exception or the user's interrupt, the next call would wait for the requests that are left.
            internals.abandon(self.llm)
            self.drafter.drafting.end()
        if call.speculators:
            self.remember_drafters(call.speculators)
        return run

    def _run(self, call: Call, ticket: int) -> CallResult:
        sequences, drafting = call.sequences, self.drafter.drafting
        prompts = [
            {"prompt_token_ids": sequences.token_ids[i, :n].tolist()} for i, n in enumerate(sequences.prompt_lengths)
        ]
        with call.recorder.generating():
            params = [self._params(call, ticket, i) for i in range(len(prompts))]
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        drafting.report_to(call.recorder)
        if drafting.num_undefined:
            raise NonFiniteLogits(UNDEFINED_LOGITS)
        logprobs = []
        for request, output in enumerate(outputs):
            completion = output.outputs[0]
            begin, tokens = sequences.prompt_lengths[request], completion.token_ids
            sequences.reserve(int(begin) + len(tokens))
            sequences.token_ids[request, begin : begin + len(tokens)] = tokens
            sequences.lengths[request] = begin + len(tokens)
            logprobs.append([entry[token].logprob for token, entry in zip(tokens, completion.logprobs, strict=True)])
        findings = [
            *dead_drafters.findings(call.recorder, drafting.proposing.num_asked, drafting.proposing.num_proposed),
            *self._lost.findings(call.recorder, drafting.num_due, drafting.num_steps),
        ]
        on_host = self.view.device.type == "cpu"
        return CallResult(logprobs, drafting.plain_forwards(call), findings, draws_all=on_host)

    def eos_token_ids(self) -> list[int]:
        return ending_tokens_of(self.view.config)

    def audited(self, model: Any, policy: nn.Module | None) -> nn.Module | None:
        return policy

    def check_drafters(self, speculators: Mapping[str, Speculator]) -> None:
        self._lost.check(speculators)

    def remember_drafters(self, speculators: Mapping[str, Speculator]) -> None:
        self._lost.remember(speculators)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        internals.reload_weights(self.llm, weights)

    def _params(self, call: Call, ticket: int, request: int) -> Any:
        from vllm import SamplingParams

        sequences, sampling = call.sequences, call.sequences.sampling
        return SamplingParams(
            max_tokens=int(call.max_lengths[request] - sequences.prompt_lengths[request]),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            stop_token_ids=list(sampling.eos_token_ids),
            ignore_eos=True,  # the call's ending tokens apply, not the tokenizer's
            logprobs=0,
            detokenize=False,
            extra_args={EXTRA_REQUEST: [ticket, request]},
            **call.extra,
        )
