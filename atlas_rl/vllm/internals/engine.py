"""A running engine's runner, drafter, ranks, prefix cache and embeddings."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import torch
from torch import nn

from atlas_kernels.noise import mix64
from atlas_rl.policy.logit_form import LogitForm, fit_form
from atlas_rl.policy.view import PolicyView
from atlas_rl.vllm.internals.runner import Hooks
from atlas_rl.vllm.internals.version import INSTALLED

logger = logging.getLogger(__name__)

_ROUNDING = 0.03  # in logits: error of two-byte number formats


class VllmView(PolicyView):
    """A loaded model as drafters read it.

    With tensor parallelism every rank holds a share of the vocabulary. `refresh` then gathers full copies. It must run
    on all ranks together, before the first use and after new weights (`stale`).

    Args:
        model: vLLM's model.
        config: transformers' text configuration of the model.

    Raises:
        ValueError: The model has no vocabulary embedding.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
        inputs = [table for table in tables if not isinstance(table, ParallelLMHead)] or tables
        outputs = [table for table in tables if isinstance(table, ParallelLMHead)] or inputs
        if not tables:
            raise ValueError(f"{type(model).__name__} has no vocabulary embedding that drafters could read")
        self.config, self.form = config, _form_of(model, config)
        self._model, self._form_seen = model, False
        self.stale = True
        self._sharded = inputs[0].tp_size > 1
        self._inputs, self._outputs = _Table(inputs[0]), _Table(outputs[0])
        self.weights_changed()

    def weights_changed(self) -> None:
        """Mark the embeddings as stale: the model has new weights."""
        self.stale = True
        if not self._sharded:
            self.refresh()

    def refresh(self) -> None:
        """Read the embeddings again; collective under tensor parallelism."""
        self._inputs.read()
        self._outputs.read()
        self.stale = False
        if not self._form_seen:
            self._form_seen = True
            self._see_form()

    @property
    def input_table(self) -> torch.Tensor:
        return self._inputs.weight

    @property
    def output_table(self) -> torch.Tensor:
        return self._outputs.weight

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(token_ids, self._inputs.weight)

    def output_rows(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, bias = self._outputs.weight[token_ids], self._outputs.bias
        return rows, rows.new_zeros(len(rows)) if bias is None else bias[token_ids]

    def logits(self, states: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        if token_ids is not None:
            return super().logits(states, token_ids)
        # For the whole vocabulary the table is read where it is, not copied row by row.
        assert self.form is not None
        weight, bias = self._outputs.weight, self._outputs.bias
        return self.form(nn.functional.linear(states.to(weight.dtype), weight, bias).float())

    @torch.inference_mode()
    def _see_form(self) -> None:
        """Check the form against the model's own `compute_logits`; collective under tensor parallelism.

        With LoRA layers, `compute_logits` accepts only rows of the running batch, so the form is taken from the
        configuration.
        """
        from vllm.lora.layers import BaseLayerWithLoRA

        if any(isinstance(module, BaseLayerWithLoRA) for module in self._model.modules()):
            return
        weight, bias = self._outputs.weight, self._outputs.bias
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(4, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu")
        states = torch.cat([magnitude * directions for magnitude in (0.01, 1.0, 30.0, 1000.0)]).to(weight)
        logits: Any = self._model.compute_logits(states)  # type: ignore[operator]
        if logits is None:  # only the first rank of a group has logits, and it drafts for all
            return
        assert self.form is not None
        products = nn.functional.linear(states, weight, bias).float()
        form, _ = fit_form(products.cpu(), logits.float().cpu(), self.form, tolerance=_ROUNDING)
        if form is None:
            logger.warning(
                "atlas_rl: the logits of %s are not what its LM head and %s make: drafters that learn may draft badly",
                type(self._model).__name__,
                self.form,
            )
        else:
            self.form = form


def _form_of(model: nn.Module, config: Any) -> LogitForm:
    """The logit form according to the model's logits processor, which caps before it scales."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            scale = float(module.scale)
            return LogitForm(scale, None if module.soft_cap is None else scale * float(module.soft_cap))
    return LogitForm.of(config)


class _Table:
    """One embedding. If it is sharded, its weight has a shape but no values before the first `read`."""

    def __init__(self, table: Any) -> None:
        self._table = table
        weight = table.weight.data
        if table.tp_size > 1:
            weight = weight.new_empty(table.org_vocab_size, weight.shape[1])
        self.weight: torch.Tensor = weight[: table.org_vocab_size]
        self.bias: torch.Tensor | None = None

    def read(self) -> None:
        self.weight = self._whole(self._table.weight.data)
        bias = getattr(self._table, "bias", None)
        self.bias = None if bias is None else self._whole(bias.data)

    def _whole(self, values: torch.Tensor) -> torch.Tensor:
        if self._table.tp_size > 1:
            from vllm.distributed import tensor_model_parallel_all_gather

            values = tensor_model_parallel_all_gather(values, dim=0)
        return values[: self._table.org_vocab_size]


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process; `ValueError` if the engine runs in another one."""
    executor = getattr(llm.llm_engine, "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    if worker is None:
        raise ValueError(
            "this vLLM engine runs in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported, or "
            "use a server (docs/vllm.md)"
        )
    return worker.model_runner


def drafter_of(llm: Any) -> Hooks | None:
    """Our proposer inside an engine of this process; None if it has none or another one."""
    drafter = getattr(runner_of(llm), "drafter", None)
    return drafter if isinstance(drafter, Hooks) else None


def replica_seed(vllm_config: Any) -> int:
    """Seed for requests that bring none: another one for every data-parallel replica, as for vLLM's own generators.

    Replicas answer equal requests, and number them alike. With one seed, their samples would be copies of each other.
    """
    seed, replica = int(vllm_config.model_config.seed or 0), int(vllm_config.parallel_config.data_parallel_index)
    return mix64(mix64(seed) ^ replica) if replica else seed


def tensor_parallel() -> tuple[int, int, Any]:
    """Rank, size and group of tensor parallelism in this process."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    return group.rank_in_group, group.world_size, group


def abandon(llm: Any) -> None:
    """Remove the requests of an unfinished call; does nothing after a finished one.

    A step that was cut off has scheduled tokens that were never run. The runner's half of the step and the prefix cache
    remember them as computed, so both are dropped with the requests.
    """
    left = list(llm.llm_engine.output_processor.request_states)
    if left:
        llm.llm_engine.abort_request(left, internal=True)
        runner_of(llm).execute_model_state = None
        llm.reset_prefix_cache()


def agree(failed: str | None) -> str | None:
    """Share errors among the ranks of the tensor-parallel group; returns an error of any rank, or None."""
    _, size, group = tensor_parallel()
    if size == 1:
        return failed
    everyone: list[str | None] = [None] * size
    torch.distributed.all_gather_object(everyone, failed, group=group.cpu_group)
    return next((one for one in everyone if one is not None), None)


def reset_prefix_cache_with_new_weights(methods: tuple[str, ...]) -> None:
    """Make these methods of a worker reset the engine's prefix cache, which holds results of the old weights.

    The prefix cache lives in the engine's scheduler, out of a worker's reach. Running requests are preempted and run
    again, because vLLM keeps the blocks they hold. Does nothing if workers are separate processes.
    """
    core = sys.modules.get("vllm.v1.engine.core")
    if core is None or hasattr(core.EngineCore.collective_rpc, INSTALLED):
        return
    original = core.EngineCore.collective_rpc

    @functools.wraps(original)
    def collective_rpc(engine: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(engine, method, *args, **kwargs)
        if method in methods:
            engine.reset_prefix_cache(reset_running_requests=True)
        return result

    setattr(collective_rpc, INSTALLED, True)
    core.EngineCore.collective_rpc = collective_rpc


def in_engine_process(vllm_config: Any) -> bool:
    """Whether the engine's scheduler runs in this worker's process."""
    return vllm_config.parallel_config.distributed_executor_backend in ("uni", "external_launcher")
