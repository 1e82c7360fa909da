"""The proposer that vLLM loads by name: `speculative_config={"method": "custom_class", "model": <path of AtlasProposer>}`.

vLLM builds it in every worker, before it loads the policy. It has two options, given in vLLM's own
`additional_config={"atlas_rl": {...}}`: `draft_model`, the folder of the static speculator, and `idle_learning`, whether
drafters learn while the engine has nothing to do. Everything else has defaults.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from atlas_rl.controller.goodput import GoodputController
from atlas_rl.decode.defaults import bind_all, default_speculators
from atlas_rl.decode.guard import FOLLOWING, GuardedController
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import StepReport
from atlas_rl.speculators.static_heads import head_layers, head_speculator
from atlas_rl.vllm import internals
from atlas_rl.vllm.checkpoint import Described, check, describe, served_folder, tensors
from atlas_rl.vllm.checks import UNDEFINED_LOGITS, check_engine, options_of
from atlas_rl.vllm.drafting import Drafting
from atlas_rl.vllm.draw import compile_draw
from atlas_rl.vllm.internals import Forward, ForwardBatch, Hooks, VllmView
from atlas_rl.vllm.settling import compile_settling
from atlas_rl.vllm.spare_time import SpareTime

Value = TypeVar("Value")
_NEW_WEIGHTS = ("atlas_load_weights", "atlas_policy_updated", "finish_weight_update")
"""Methods of a worker after which cached prefixes are another policy's."""


class AtlasProposer(Hooks):
    """History index, recurrent head, static head and controller inside a vLLM worker.

    Args:
        vllm_config: vLLM's configuration of the worker.

    Raises:
        ValueError: The engine has an unsupported option; the message says what to change.
    """

    def __init__(self, vllm_config: Any) -> None:
        internals.install()  # before the runner that builds this object loads its model
        internals.reset_prefix_cache_with_new_weights(_NEW_WEIGHTS)
        internals.register_backends()
        internals.follow_adapters()
        check_engine(vllm_config)
        internals.check_hybrid(vllm_config)
        self.options = options_of(vllm_config)
        self.identity = secrets.token_hex(8)  # changes when a server is restarted
        self.policy: VllmView | None = None
        self._model: nn.Module | None = None
        model_config = vllm_config.model_config
        self._model_config, self._config = model_config, model_config.hf_text_config
        self._served: dict[str, Described] | str = "no weights have been loaded yet"
        self.drafting = Drafting(
            max_draft_tokens=vllm_config.speculative_config.num_speculative_tokens,
            max_length=model_config.max_model_len,
            max_batch=vllm_config.scheduler_config.max_num_seqs,
            vocab_size=model_config.get_vocab_size(),
            seed=internals.replica_seed(vllm_config),
        )
        self._spare_time = SpareTime(self.drafting)
        if self.options.get("idle_learning"):
            internals.study_while_waiting(vllm_config.parallel_config)
        folder = self.options.get("draft_model")
        if folder is not None:
            self.layers = head_layers(folder, self._config.num_hidden_layers)
            self.drafting.requests.lengthen_epochs()

    @property
    def recorder(self) -> StepRecorder:  # type: ignore[override]
        """Recorder that the hooks charge seconds to."""
        return self.drafting.recorder

    def load_model(self, target_model: nn.Module) -> None:
        """Keep the model; called by vLLM. Builds nothing: tensors made now are lost if the engine sleeps at level 2."""
        self._model = target_model
        compile_draw(self.drafting.vocab_size, next(target_model.parameters()).device)
        internals.follow(target_model, self)
        try:
            folder = served_folder(self._model_config.model, self._model_config.revision)
            self._served = describe(folder)
        except ValueError as error:  # serving may still work, and new weights may come by other means
            self._served = str(error)

    def prepare(self, *, defaults: bool = True) -> None:
        """Build what needs the loaded policy, with the default speculators or none; runs before the first step.

        Only the first rank of a tensor-parallel group drafts, so only it has speculators.
        """
        if self.policy is not None:
            return
        assert self._model is not None, "vLLM loads the model before it asks for drafts"
        self.policy = VllmView(self._model, self._config)
        compile_settling()
        if defaults and internals.tensor_parallel()[0] == 0:
            chosen = default_speculators()
            if "draft_model" in self.options:
                chosen.append(head_speculator(self.options["draft_model"]))
            faults = self.drafting.faults
            speculators = bind_all(chosen, self.policy, faults, couples_noise=True)
            self.drafting.use(speculators, GuardedController(GoodputController(tuple(speculators)), faults))

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """vLLM's own call, which the hooks replace. It runs only if they are not installed."""
        raise RuntimeError("atlas_rl: vLLM's model runner asked for drafts past the hooks; report this vLLM version")

    def keys(self, batch: ForwardBatch) -> np.ndarray:
        return self.drafting.requests.keys(batch)

    def ended(self, names: set[str]) -> None:
        self._guarded("forget", lambda: self.drafting.forget(names), None)

    def policy_updated(self, version: int | None) -> dict[str, Any]:
        """Handle new weights on a server; called on every rank of a tensor-parallel group.

        Drafters read embeddings when they hear of a policy, so its embeddings are gathered first.
        """
        self.weights_changed()
        with torch.inference_mode(False), torch.no_grad():
            self._gather_tables()
        self.drafting.policy_updated(version)
        return {"policy_version": self.drafting.tracker.version}

    def load_checkpoint(self, runner: Any, folder: str, version: str | None) -> dict[str, Any]:
        """See `AtlasWorkerExtension.atlas_load_weights`."""
        number = self.drafting.tracker.checked(version)
        refused = internals.agree(self._refusal(folder))
        if refused is not None:
            raise ValueError(f"{refused}. The old weights are served on")
        internals.load_all_or_nothing(runner, tensors(folder))
        return self.policy_updated(number)

    def _refusal(self, folder: str) -> str | None:
        """Reason why a checkpoint cannot be loaded; None if it can."""
        if isinstance(self._served, str):
            return f"the checkpoint that is served cannot be read, so nothing can be compared with it: {self._served}"
        try:
            check(folder, self._served, self._model_config.dtype)
        except ValueError as error:
            return str(error)
        return None

    def status(self) -> dict[str, Any]:
        """See `AtlasWorkerExtension.atlas_status`."""
        return {
            "server": self.identity,
            "policy_version": self.drafting.tracker.version,
            "weights_are_whole": self.weights_are_whole,
            "num_trainers": self.num_trainers,
        }

    def take_report(self) -> StepReport:
        """See `Drafting.take_report`."""
        return self.drafting.take_report()

    def weights_changed(self) -> None:
        if self.policy is not None:
            self.policy.weights_changed()

    def undefined_logits(self, num_positions: int) -> None:
        self.drafting.num_undefined += num_positions
        self.recorder.warn(UNDEFINED_LOGITS)

    def propose_after(self, forward: Forward) -> list[list[int]]:
        rank, size, group = internals.tensor_parallel()
        self.prepare()
        self._gather_tables()
        drafts: list[list[int]] = [[] for _ in forward.batch.names]
        if rank == 0:  # a controller reads its own rank's clock, so one rank decides for all
            drafts = self._guarded("step", lambda: self.drafting.step(forward), drafts)
        return drafts if size == 1 else group.broadcast_object(drafts, src=0)

    def learn(self) -> None:
        self._guarded("learn", self.drafting.learn, None)

    def has_spare_time(self) -> bool:
        return self._spare_time.is_there()

    def study(self) -> None:
        self._guarded("study", self._spare_time.study, None)

    def rest(self, *, expects_tokens: bool) -> None:
        self._spare_time.rest(expects_tokens=expects_tokens)

    def _gather_tables(self) -> None:
        """Read the policy's embeddings again if its weights have changed; on every rank at the same point."""
        if self.policy is not None and self.policy.stale:
            self.policy.refresh()

    def _guarded(self, where: str, call: Callable[[], Value], otherwise: Value) -> Value:
        """Catch errors while following requests: running requests lose their drafts, but the server never stops."""
        result, went_well = self.drafting.faults.attempt(FOLLOWING, where, call, otherwise)
        if not went_well:
            self.drafting.give_up()
        return result
