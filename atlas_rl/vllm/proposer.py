"""The proposer that vLLM loads by name: `speculative_config={"method": "custom_class", "model": <path of AtlasProposer>}`.

vLLM builds it in every worker, before it loads the policy. Options come in vLLM's own
`additional_config={"atlas_rl": {"draft_model": FOLDER}}`, the static speculator; all else has defaults.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from atlas_rl.controller.goodput import GoodputController
from atlas_rl.decode.defaults import bind_all, default_speculators
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import StepReport
from atlas_rl.speculators.eagle3.checkpoint import eagle3_layers
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.vllm import internals
from atlas_rl.vllm.checks import check_engine, options_of
from atlas_rl.vllm.drafting import Drafting
from atlas_rl.vllm.internals import Forward, Hooks, Request, VllmView


class AtlasProposer(Hooks):
    """History index, recurrent head, static head and controller inside a vLLM worker.

    Args:
        vllm_config: vLLM's configuration of the worker.

    Raises:
        ValueError: An engine option that drafting like this cannot live with, said with what to change.
    """

    def __init__(self, vllm_config: Any) -> None:
        internals.install()  # before the runner that asks for this object loads its model
        check_engine(vllm_config)
        self.options = options_of(vllm_config)
        self.policy: VllmView | None = None
        self._model: nn.Module | None = None
        model_config = vllm_config.model_config
        self._config = model_config.hf_text_config
        self.drafting = Drafting(
            max_draft_tokens=vllm_config.speculative_config.num_speculative_tokens,
            max_length=model_config.max_model_len,
            max_batch=vllm_config.scheduler_config.max_num_seqs,
            vocab_size=model_config.get_vocab_size(),
            seed=int(model_config.seed or 0),
        )
        folder = self.options.get("draft_model")
        if folder is not None:
            self.layers = eagle3_layers(folder, self._config.num_hidden_layers)

    @property
    def recorder(self) -> StepRecorder:  # type: ignore[override]
        """Where the hooks charge seconds to."""
        return self.drafting.recorder

    def load_model(self, target_model: nn.Module) -> None:
        """Called by vLLM. Nothing is built yet: tensors made now are lost when the engine goes to sleep at level 2."""
        self._model = target_model

    def prepare(self, *, defaults: bool = True) -> None:
        """Build what needs the loaded policy, with the default speculators or none; at the first step at the latest."""
        if self.policy is not None:
            return
        assert self._model is not None, "vLLM loads the model before it asks for drafts"
        self.policy = VllmView(self._model, self._config)
        if defaults:
            chosen = default_speculators()
            if "draft_model" in self.options:
                chosen.append(Eagle3Speculator(self.options["draft_model"]))
            speculators = bind_all(chosen, self.policy, couples_noise=True)
            self.drafting.use(speculators, GoodputController(tuple(speculators)))

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """vLLM's own call, which the hooks replace: here only if they were not installed."""
        raise RuntimeError("atlas_rl: vLLM's model runner asked for drafts past the hooks; report this vLLM version")

    def keys(self, requests: list[Request]) -> np.ndarray:
        return self.drafting.requests.keys(requests)

    def ended(self, names: set[str]) -> None:
        self.drafting.forget(names)

    def policy_updated(self, version: int | None) -> dict[str, Any]:
        """New weights, on a server."""
        self.drafting.policy_updated(version)
        return {"policy_version": self.drafting.tracker.version}

    def take_report(self) -> StepReport:
        """See `Drafting.take_report`."""
        return self.drafting.take_report()

    def weights_changed(self) -> None:
        if self.policy is not None:
            self.policy.weights_changed()

    def propose_after(self, forward: Forward) -> list[list[int]]:
        rank, size, group = internals.tensor_parallel()
        self.prepare()
        assert self.policy is not None
        if self.policy.stale:
            self.policy.refresh()  # on every rank, in the same step
        if size == 1:
            return self.drafting.step(forward)
        # A controller reads its rank's own clock: rank 0 decides for all.
        return group.broadcast_object(self.drafting.step(forward) if rank == 0 else None, src=0)
