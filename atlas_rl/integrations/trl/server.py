"""Lets TRL trainers generate with a vLLM server whose drafters follow the policy (`vllm_mode="server"`).

TRL's `VLLMGeneration` is kept with its client: it gathers prompts and weights over ranks and sends them. In the server,
the drafters are notified of new weights. The adapter around it gives every call a seed, fetches the server's report,
and checks that the server serves the trainer's policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from atlas_rl.config import EngineConfig
from atlas_rl.integrations.trl.adapter import TrainerAdapter, check_attached_once, check_same_policy, refuse_images
from atlas_rl.integrations.trl.checks import check_tools, check_trainer
from atlas_rl.integrations.trl.kinds import kind_of
from atlas_rl.integrations.trl.sampling import TrainerSampling
from atlas_rl.integrations.trl.server_client import AtlasClient, ServerCall, ServerStatus, our_clients
from atlas_rl.integrations.trl.together import Value, of_main_rank, on_all_ranks, while_attaching
from atlas_rl.integrations.trl.vllm import checked_sampling
from atlas_rl.integrations.trl.whole_policy import reach_all_weights
from atlas_rl.policy.unwrap import unwrap_policy
from atlas_rl.report.report import Mode, StepReport

if TYPE_CHECKING:
    from atlas_rl.core import SamplingParams
    from atlas_rl.rollout.engine import RolloutEngine

_SAMPLING = ("repetition_penalty", "temperature", "top_p", "top_k", "min_p")
_OF_A_SERVER = {
    "draft_model": "give the server its folder, `atlas-rl vllm-serve MODEL --draft-model FOLDER`",
    "speculators": "the server makes its own",
    "controller": "the server makes its own",
    "trace": "a server keeps no trace",
    "max_batch_size": "a server has --max-num-seqs",
}
"""Options of the engine that a trainer cannot give a server, and what to do."""


def attach(engine: RolloutEngine, trainer: Any, baseline_every: int) -> ServerAdapter:
    """Put the engine around the trainer's client of a server. If it cannot, raises an error and changes nothing.

    Raises:
        ValueError: Unsupported options of engine or trainer, or a server without our drafters.
        ConnectionError: No server answers.
    """
    sampling = while_attaching(trainer, lambda: _checked(engine, trainer, baseline_every))
    generation = getattr(trainer, "vllm_generation", None) or _new_generation(trainer, sampling.params)
    adapter = ServerAdapter(engine, trainer, generation)
    adapter.install()
    return adapter


def _checked(engine: RolloutEngine, trainer: Any, baseline_every: int) -> TrainerSampling:
    """The trainer's sampling options; `ValueError` if the engine cannot be attached."""
    check_attached_once(engine, trainer)
    check_trainer(trainer, baseline_every, in_process=False)
    check_tools(
        trainer,
        trainer.accelerator.num_processes,
        "a server",
        "train with one process (the server may use several GPUs), or generate in process or with a colocated vLLM",
    )
    check_same_policy(engine, trainer)
    _check_options(engine.config, baseline_every)
    _check_teacher(trainer)
    sampling = checked_sampling(trainer, seed=0)
    unwrap_policy(trainer.model)  # the server gets merged layers: weights held by a wrapper would be lost
    if getattr(trainer, "vllm_generation", None) is None and not kind_of(trainer).built_later:
        raise ValueError(
            f"{type(trainer).__name__} sets up other parts together with its vLLM client: build it inside of "
            "engine.prepare_vllm(), with use_vllm=True and vllm_mode='server'"
        )
    return sampling


def _check_options(config: EngineConfig, baseline_every: int) -> None:
    for name, instead in _OF_A_SERVER.items():
        if getattr(config, name) not in (None, False):
            raise ValueError(f"{name} is not an option of a trainer whose server drafts: {instead}")
    if not config.speculation:
        raise ValueError("speculation=False cannot be set on a server: start it with `vllm serve` and attach nothing")
    if config.verification != "invariant":
        raise ValueError("the server verifies by drafter-invariant sampling: leave verification='invariant'")
    if baseline_every:
        raise ValueError("a server does not repeat calls without speculation: leave baseline_every=0")


def _check_teacher(trainer: Any) -> None:
    """Raise `ValueError` if the server would also have to score prompts, which vLLM skips under speculation."""
    if getattr(trainer, "use_teacher_server", False):
        raise ValueError(
            "use_teacher_server=True asks the server for the logprobs of prompts, which vLLM does not compute where it "
            "drafts: leave it at False, and the teacher runs beside the trainer"
        )


def _new_generation(trainer: Any, sampling: SamplingParams) -> Any:
    """Build TRL's object for `use_vllm=True`, with our client."""
    from trl.generation.vllm_generation import VLLMGeneration

    args = trainer.args
    with our_clients():
        return VLLMGeneration(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode="server",
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            logprobs=0,
            generation_kwargs=args.generation_kwargs,
            max_completion_length=sampling.max_new_tokens,
            **{name: getattr(sampling, name) for name in _SAMPLING},
        )


class ServerAdapter(TrainerAdapter):
    """Generates for a trainer through TRL's own `VLLMGeneration` and a server that drafts.

    Only the main process talks to the server. Its errors are raised on every rank, so that no rank waits for it.

    Args:
        engine: Publishes the reports.
        trainer: Its sampling options are read at every generation.
        generation: TRL's `VLLMGeneration` in server mode.

    Raises:
        ValueError: Unsupported sampling options, or a server without our drafters.
        ConnectionError: No server answers.
    """

    shares_weights = False
    drafts_here = False

    def __init__(self, engine: RolloutEngine, trainer: Any, generation: Any) -> None:
        self.generation = generation
        self._accelerator = trainer.accelerator
        self._client = AtlasClient.adopting(generation.vllm_client) if self._accelerator.is_main_process else None
        self._server: ServerStatus = self._agreed(self._meet)
        self._sync_s = 0.0
        super().__init__(engine, trainer, baseline_every=0)
        self._reports.leads = self._accelerator.is_main_process  # its report covers the rollouts of all ranks

    def install(self) -> None:
        if self._client is not None:
            self.generation.vllm_client = self._client
        super().install()

    def sync_weights(self) -> None:
        """Send the policy's weights to the server after an update; its drafters are then refreshed."""
        step = int(self.trainer.state.global_step)
        if self._synced_step == step:
            return
        began_s = time.perf_counter()
        self._agreed(lambda: self._check_server(self._server.policy_version))
        on_all_ranks(self._accelerator, "sending weights", self._send)
        self._server = self._agreed(lambda: self._check_server(self._server.policy_version + 1))
        self._synced_step = step
        self._sync_s += time.perf_counter() - began_s

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> Any:
        """Generate as `VLLMGeneration.generate` does, on all ranks together.

        Raises:
            ValueError: The prompts contain images.
            ConnectionError: The server does not answer.
            RuntimeError: The server returns an error, or serves another policy than the trainer's.
        """
        step = int(self.trainer.state.global_step)
        mode: Mode = "train" if self.trainer.model.training else "eval"
        seed = self._seed(step, mode)

        def read() -> TrainerSampling:
            refuse_images(images)
            return self._sampling(seed)

        sampling = on_all_ranks(self._accelerator, "reading its prompts and options", read)
        for name in _SAMPLING:
            setattr(self.generation, name, getattr(sampling.params, name))
        self.generation.max_completion_length = sampling.params.max_new_tokens
        call = ServerCall(sampling.params.seed, list(sampling.params.eos_token_ids))
        if mode == "train":
            self._importance.warn_uncorrected(sampling.params)
        self._agreed(lambda: self._check_server(self._server.policy_version))
        began_s = time.perf_counter()
        with self._calling(call):
            answer = self.generation.generate(prompts, images, num_generations, profiler)
        seconds = time.perf_counter() - began_s
        report = self._agreed(lambda: self._report(call, step, mode, seconds))
        self._reports.add(report)
        return answer

    def _sampling(self, seed: int) -> TrainerSampling:
        return checked_sampling(self.trainer, seed)

    @contextmanager
    def _calling(self, call: ServerCall) -> Iterator[None]:
        """Context in which requests of the main process belong to `call`."""
        if self._client is not None:
            self._client.call = call
        try:
            yield
        finally:
            if self._client is not None:
                self._client.call = None

    def _agreed(self, call: Callable[[], Value]) -> Value:
        """Result of `call` on the main process, on every rank; so is its error."""
        return of_main_rank(self._accelerator, call)

    @property
    def _main_client(self) -> AtlasClient:
        assert self._client is not None, "only the main process has a client"
        return self._client

    def _meet(self) -> ServerStatus:
        """Record the server's identity and discard its report of earlier work."""
        self._main_client.check_server_is_ours()
        self._main_client.report()
        met, connection = self._main_client.status(), self._main_client.connection
        return met if connection is None else replace(met, num_trainers=connection)

    def _check_server(self, version: int) -> ServerStatus:
        """The server's status; `RuntimeError` unless it is the expected server with the expected policy version."""
        client = self._main_client
        now = client.status()
        if now.server != self._server.server:
            raise RuntimeError(
                f"the vLLM server at {client.base_url} was restarted and has lost the policy: resume the run from "
                "its last checkpoint, which sends the weights anew"
            )
        if now.num_trainers != self._server.num_trainers:
            raise RuntimeError(
                f"another trainer has connected to the vLLM server at {client.base_url}, which now takes weights from that "
                "one only. One server serves one trainer: start a server for each, and resume from the last checkpoint"
            )
        if now.policy_version != version:
            raise RuntimeError(
                f"the vLLM server at {client.base_url} serves policy version {now.policy_version}, expected {version}: "
                "another client has changed its weights, or an update was lost. One server serves one trainer"
            )
        if not now.weights_are_whole:
            raise RuntimeError(
                f"the vLLM server at {client.base_url} holds a policy that is partly new: a weight update did not come to "
                "its end. Resume the run from its last checkpoint, which sends the weights anew"
            )
        return now

    def _send(self) -> None:
        """Send the weights, or take part in gathering them; raises `RuntimeError` if they did not reach the server."""
        try:
            reach_all_weights(self.generation, self.trainer)
            self.generation.sync_weights()
        except Exception as error:
            if self._client is None:
                raise
            raise RuntimeError(
                f"the policy's weights did not reach the vLLM server at {self._client.base_url}: {error}"
            ) from error

    def _report(self, call: ServerCall, step: int, mode: Mode, seconds: float) -> StepReport:
        """The server's report of a call, with the trainer's counts and waiting time."""
        client = self._main_client
        if call.failure is not None:
            kind = ConnectionError if isinstance(call.failure, OSError) else RuntimeError
            raise kind(f"the vLLM server at {client.base_url} gave no completions: {call.failure}") from call.failure
        report = client.report()
        if report.policy_version != self._server.policy_version:
            raise RuntimeError(
                f"the vLLM server at {client.base_url} generated with policy version {report.policy_version}, expected "
                f"{self._server.policy_version}: it was started again, or another client has changed its weights"
            )
        warnings, num_tokens = report.warnings, sum(call.completion_lengths)
        if report.num_tokens > num_tokens:
            warnings += (
                f"the server generated {report.num_tokens - num_tokens} tokens for others meanwhile: its figures of "
                "drafting and its seconds count them",
            )
        sync_s, self._sync_s = self._sync_s, 0.0
        busy_s = report.generate_s - report.refresh_s
        return replace(
            report,
            step=step,
            policy_version=self._synced_step or 0,  # some trainers do not send weights after every step
            mode=mode,
            num_requests=len(call.completion_lengths),
            num_prompt_tokens=call.num_prompt_tokens,
            num_tokens=num_tokens,
            completion_lengths=call.completion_lengths,
            generate_s=seconds + sync_s,
            sync_s=max(0.0, sync_s - report.refresh_s),
            other_s=max(0.0, seconds - busy_s),
            warnings=warnings,
        )
