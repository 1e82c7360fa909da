"""`RolloutEngine`: checks, runs, audits and reports one generation call, and keeps state between calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import nn

from atlas_rl import progress
from atlas_rl.audit.auditor import Audit, Auditor
from atlas_rl.checks import token_ids
from atlas_rl.config import EngineConfig
from atlas_rl.controller.base import Controller
from atlas_rl.controller.fixed import NoSpeculation
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Rollouts, SamplingParams
from atlas_rl.decode.defaults import bind_all, default_speculators
from atlas_rl.decode.generate import Backend, Call, CallResult, ending_tokens_of
from atlas_rl.decode.guard import Faults, GuardedController
from atlas_rl.policy.threads import one_at_a_time
from atlas_rl.report.lost_writes import LostWrites
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import Mode, StepReport, no_speculation_seconds, with_sync
from atlas_rl.report.sinks import console_line, console_warnings, sinks_in
from atlas_rl.rollout.backends import check_tokenizer, new_backend, resized, static_speculator
from atlas_rl.rollout.output import GenerationOutput
from atlas_rl.rollout.requests import REQUIRED, build_sequences, check_names
from atlas_rl.speculators.base import Speculator
from atlas_rl.sync.checkpoint import file_to_read, file_to_write, load_state, restore, save_state
from atlas_rl.sync.refresh import PolicyTracker, RolloutExchange

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_KEPT_REPORTS = 1000


class RolloutEngine:
    """Lossless speculative rollouts whose drafters follow the policy; `AtlasRolloutEngine` attaches trainers.

    Tokens are exactly the policy's: equal seeds give equal tokens, whatever is drafted and with speculation off.
    Threads may share engines and policies (`policy/threads.py`). An interrupted call leaves them usable.

    Args:
        model: The policy, needed for stand-alone use only. In process a causal LM, whose weights are shared, never
            copied; for vLLM a checkpoint's folder or name, or a `vllm.LLM` of this process built with
            `atlas_rl.vllm.backend.llm_arguments()`.
        tokenizer: Provides the ending tokens; may be None if `generate` gets `eos_token_ids`.
        options: See `EngineConfig`.

    Raises:
        ValueError: An option is unknown, or has an invalid value, such as a folder that cannot be written to.
    """

    _without_policy = (
        "this engine has no policy: use AtlasRolloutEngine(model=..., tokenizer=...).generate(...) stand-alone, or "
        "AtlasRolloutEngine().attach(trainer) in training"
    )

    def __init__(
        self,
        *positional: Never,
        model: nn.Module | str | Path | Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        if positional:
            raise TypeError("the engine takes its arguments by name: AtlasRolloutEngine(model=policy, tokenizer=...)")
        self.config = EngineConfig.of(options)
        check_tokenizer(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.reports: list[StepReport] = []  # the newest
        self._backend: Backend | None = None
        self._speculators: dict[str, Speculator] | None = None
        self._controller: Controller | None = None
        self._restored: dict[str, Any] = {}  # saved state, kept until the first rollout makes the speculators
        self._restores_strictly, self._policy, self._faults = True, PolicyTracker(), Faults()
        self._auditor = Auditor(self.config.audit_share)
        self._calls, self._sync_s, self._lost = 0, 0.0, LostWrites()
        self._sink, self._trace_sink = sinks_in(self.config.output_dir, trace=self.config.trace)
        if model is not None:
            self._speculators_for(self._backend_for(model))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_generations: int = 1,
        max_new_tokens: int = REQUIRED,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        eos_token_ids: Sequence[int] | int | None = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> GenerationOutput:
        """Generate stand-alone.

        Args:
            prompts: Token ids, at least one per prompt.
            num_generations: Completions per prompt; the prompt is run once for all of them.
            max_new_tokens: Most tokens per completion. A completion also ends when the policy's context is full.
            temperature: See `SamplingParams`; so for the next four.
            top_k: Number of tokens kept; 0 keeps all.
            top_p: Probability kept.
            min_p: Least probability kept, relative to the likeliest token's.
            repetition_penalty: 1 is off.
            eos_token_ids: Tokens that end a completion, or a single one; None takes the tokenizer's and the policy's.
            seed: Equal seeds give equal tokens; None draws one from torch's generator.
            unknown: Refused with an error that names the nearest option.

        Raises:
            ValueError: An argument is invalid; nothing has been generated then.
        """
        check_names(unknown, max_new_tokens)
        if self.model is None:
            raise ValueError(self._without_policy)
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos_token_ids=token_ids("eos_token_ids", self._default_eos() if eos_token_ids is None else eos_token_ids),
            seed=int(torch.randint(2**62, (), device="cpu").item()) if seed is None else seed,
        )
        output = self.rollout(self.model, prompts, sampling, num_generations=num_generations)
        self.publish(output.report)
        return output

    @one_at_a_time
    def rollout(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        num_generations: int = 1,
        mode: Mode = "standalone",
        step: int | None = None,
        speculation: bool | None = None,
        extra: Mapping[str, Any] | None = None,
        policy: nn.Module | None = None,
    ) -> GenerationOutput:
        """Generate with `model` and report, without publishing the report. For integrations.

        Args:
            model: The policy or a wrapper of it; a `VllmBackend` for a policy that vLLM runs.
            prompts: Token ids.
            sampling: Sampling parameters.
            num_generations: Completions per prompt.
            mode: Mode in the report.
            step: Step in the report; None counts calls.
            speculation: None follows the engine's option. Measuring reruns, which set it to False, are not audited.
            extra: Further sampling parameters of vLLM.
            policy: The policy in process, for the audit, if vLLM runs a copy of it; None audits nothing there.
        """
        backend = self._backend_for(model)
        sizes = backend.vocab_size, backend.max_context
        sequences, max_lengths = build_sequences(prompts, num_generations, sampling, *sizes, self.policy_version)
        use = self.config.speculation if speculation is None else speculation
        speculators = self._speculators_for(backend) if use else {}
        controller = (self._controller if use else None) or NoSpeculation(explain=self.config.trace)
        recorder = StepRecorder(speculators=tuple(speculators), clock=self.config.clock)
        call = Call(sequences, max_lengths, speculators, controller, recorder, extra or {})
        run = call.run_on(backend)
        if self._trace_sink is not None:
            with self._lost.tolerate("controller trace"):
                own = {"call": self._calls, "speculation": use}
                self._trace_sink.write_rows(own | {"step": i, **each} for i, each in enumerate(run.trace))
        for message in run.findings:
            recorder.warn(message)
        self._faults.report_to(recorder)
        figures: dict[str, Any] = {}
        audited = backend.audited(model, policy)
        if self.config.audit_share and speculation is not False and audited is not None and not extra:
            figures = self._audit(audited, backend, call, run).figures()
        report = replace(self._report(call, run, mode, self._calls if step is None else step), **figures)
        if speculators:
            self._policy.finished(Rollouts(sequences, report.rollout_s, report.accepted))
        self._calls += 1
        everyone = range(len(sequences.lengths))
        prompt_ids, texts = list(map(sequences.prompt, everyone)), list(map(sequences.completion, everyone))
        return GenerationOutput(prompt_ids, texts, run.logprobs, report)

    @one_at_a_time
    def meet(self, model: Any) -> None:
        """Make the speculators for `model` now rather than at the first rollout, so that errors come before any work.

        Raises:
            ValueError: The policy cannot be run, or does not support these speculators.
        """
        if self.config.speculation:
            self._speculators_for(self._backend_for(model))

    @one_at_a_time
    def policy_updated(self, version: int | None = None, *, step: int | None = None) -> None:
        """Tell the engine that the policy's weights changed: drafters learn from the newest rollouts.

        Stand-alone users call it after their own optimizer step. `version` is the policy's, a whole number not below the
        present one (`ValueError`); None adds one. Trainers give their `step` through the integration: the version becomes
        the step, or the next one if an earlier run has come further.
        """
        version = self._policy.checked(version) if step is None else self._policy.at_step(step, used=self._calls > 0)
        speculators = self._speculators or {}
        if self._backend is not None and resized(self._backend):
            self._backend_for(self._backend.view.model)
        if self._backend is not None:
            self._backend.check_drafters(speculators)
        self._policy.advance(speculators, self._controller, version)
        if self._backend is not None:
            self._backend.remember_drafters(speculators)

    @one_at_a_time
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int | None = None) -> None:
        """Load new policy weights into a backend that keeps its own (vLLM); includes `policy_updated`.

        Args:
            weights: (name, tensor) pairs as in a checkpoint; always read to the end, even after an error.
            version: Version of the policy, not below the present one; None adds one.

        Raises:
            ValueError: The version is wrong, weights are missing or not finite, or the engine generates in process,
                where it reads the policy's own weights.
        """
        if self._backend is None:
            raise ValueError("this engine has no policy yet: weights are loaded into a policy that vLLM runs")
        version = self._policy.checked(version)
        began = time.perf_counter()
        self._backend.load_weights(weights)
        self.synced(time.perf_counter() - began)
        self.policy_updated(version)

    def share_rollouts(self, exchange: RolloutExchange) -> None:
        """Let the drafters learn from other ranks' rollouts as well; for integrations."""
        self._policy.exchange = exchange

    def measured(self, seconds: float) -> None:
        """Record seconds of a measuring rerun, which give the drafters no learning time; for integrations."""
        self._policy.measured(seconds)

    def synced(self, seconds: float) -> None:
        """Record seconds spent bringing the policy's weights into the engine, for the next report; for integrations."""
        self._sync_s += seconds

    @property
    def policy_version(self) -> int:
        """Policy version that generates the next rollouts."""
        return self._policy.version

    @one_at_a_time
    def publish(self, report: StepReport) -> None:
        """Keep a report with the newest 1000, print its line, append it to the JSONL file; see `lost_writes`."""
        self.reports[:] = [*self.reports[1 - _KEPT_REPORTS :], report]
        if self.config.console:
            with self._lost.tolerate("console line"):  # the console is often a file on the same disk
                progress.say("\n".join((console_line(report), *console_warnings(report))))
        if self._sink is not None:
            with self._lost.tolerate("report line"):
                self._sink.write(report)

    @one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """State of every speculator, by name. A resumed run that loads it drafts as well as this one."""
        if self._speculators is None:
            return dict(self._restored)
        return {name: speculator.state_dict() for name, speculator in self._speculators.items()}

    @one_at_a_time
    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Restore `state_dict()`; speculators without saved state are allowed.

        An attached engine makes its speculators at its first rollout; until then the state is kept for them.

        Args:
            state: State of speculators, by name.
            strict: False warns about state that cannot be restored and continues: that speculator starts afresh.

        Raises:
            ValueError: With `strict`: the state is damaged, or belongs to a speculator that this engine does not have.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the drafters' state is a {type(state).__name__}, expected what state_dict() returned")
        if self._speculators is None:
            self._restored, self._restores_strictly = dict(state), strict
            return
        restore(self._speculators, state, strict=strict)
        if self._backend is not None:
            self._backend.remember_drafters(self._speculators)

    @property
    def lost_writes(self) -> dict[str, int]:
        """Failed writes by kind, such as `{"report line": 3}`; empty if all is well."""
        return dict(self._lost.counts)

    def save_drafters(self, path: str | Path) -> None:
        """Write `state_dict()` to a file. A failed write gives a warning and counts in `lost_writes`."""
        file = file_to_write(path)
        with self._lost.tolerate("drafter state"):
            try:
                save_state(file, self.state_dict())
            except TypeError as error:  # from a speculator of another library
                logger.warning("atlas_rl: the drafters' state is not saved: %s", error)

    def load_drafters(self, path: str | Path) -> None:
        """Read a file from `save_drafters`. A part that does not fit gives a warning, and its drafter starts afresh.

        Raises:
            ValueError: There is no such file, it is damaged, or `save_drafters` of this version did not write it.
        """
        self.load_state_dict(load_state(file_to_read(path)), strict=False)

    @one_at_a_time
    def _backend_for(self, model: Any) -> Backend:
        backend = self._backend
        if backend is None or resized(backend) or backend.moved() or not backend.runs(model):
            backend = new_backend(model, self.config)
            self._backend = None  # if a drafter cannot be bound, all are bound again at the next call
            for speculator in (self._speculators or {}).values():
                speculator.bind(backend.view, backend.couples_noise)
            self._backend = backend
        return backend

    @one_at_a_time
    def _speculators_for(self, backend: Backend) -> dict[str, Speculator]:
        if not backend.leads:
            return {}  # another rank drafts for this one
        if self._speculators is None:
            chosen = default_speculators() if self.config.speculators is None else list(self.config.speculators)
            if self.config.draft_model is not None:
                chosen.append(static_speculator(self.config.draft_model, backend, self.tokenizer))
            speculators = bind_all(chosen, backend.view, self._faults, couples_noise=backend.couples_noise)
            controller = self.config.controller or GoodputController(tuple(speculators), explain=self.config.trace)
            given, names = list(controller.speculators), list(speculators)
            if names[: len(given)] != given:  # speculators after these are never asked
                raise ValueError(f"the controller was made for speculators {given}, the engine has {names}")
            restore(speculators, self._restored, strict=self._restores_strictly)
            self._speculators, self._controller = dict(speculators), GuardedController(controller, self._faults)
            self._restored = {}
        return self._speculators

    def _audit(self, policy: nn.Module, backend: Backend, call: Call, run: CallResult) -> Audit:
        """Compare some rollouts with a plain forward pass of the policy as its trainer runs it, wrappers included.

        Drafter-invariant sampling draws with known noise, so the audit can check every token; with rejection sampling
        it can check the distribution only.
        """
        sequences, rows = call.sequences, range(len(call.sequences.lengths))
        self._auditor.engine_dtype = backend.engine_dtype
        with call.recorder.time("audit"):
            audit = self._auditor.audit(
                policy,
                [sequences.token_ids[row, : sequences.prompt_lengths[row]].tolist() for row in rows],
                [sequences.completion(row) for row in rows],
                sequences.sampling,
                logprobs=run.logprobs,
                noise_keys=sequences.noise_keys if self.config.verification == "invariant" else None,
            )
        for message in audit.findings:
            call.recorder.warn(message)
        return audit

    def _default_eos(self) -> list[int]:
        assert self.model is not None, "generate() refuses an engine without a policy before it asks"
        found = ending_tokens_of(self.tokenizer) + self._backend_for(self.model).eos_token_ids()
        if self.tokenizer is None and not found:
            raise ValueError("no ending token is known: give the engine a tokenizer, or generate() eos_token_ids=[...]")
        return list(dict.fromkeys(found))

    def _report(self, call: Call, run: CallResult, mode: Mode, step: int) -> StepReport:
        sequences = call.sequences
        report = call.recorder.finish(
            step=step,
            policy_version=sequences.policy_version,
            mode=mode,
            num_prompt_tokens=int(sequences.prompt_lengths.sum()),
            completion_lengths=sequences.lengths - sequences.prompt_lengths,
        )
        refresh_s, sync_s, self._sync_s = self._policy.take_refresh_s(), self._sync_s, 0.0
        plain_s = no_speculation_seconds(report, run.plain.num_forwards, run.plain.seconds, draws_all=run.draws_all)
        calibration = {name: (n, error) for name, (n, error) in call.controller.take_calibration().items() if n}
        report = replace(
            report,
            scored={name: n for name, (n, _) in calibration.items()},
            calibration_error={name: error for name, (_, error) in calibration.items()},
            refresh_s=refresh_s,
            generate_s=report.generate_s + refresh_s,
            no_speculation_s=plain_s if call.recorder.speculates else None,
        )
        return with_sync(report, sync_s)
