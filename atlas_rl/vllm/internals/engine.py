"""A running engine's runner, drafter, ranks, prefix cache and embeddings."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn

from atlas_rl.policy.view import LogitForm, PolicyView
from atlas_rl.vllm.internals.runner import Hooks
from atlas_rl.vllm.internals.version import INSTALLED


class VllmView(PolicyView):
    """A loaded model as drafters read it.

    With tensor parallelism every rank holds a share of the vocabulary. `refresh` then collects copies, on all ranks
    together, before the first use and after new weights (`stale`).

    Args:
        model: vLLM's model.
        config: transformers' text configuration of it.

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
        self.config, self.form = config, LogitForm.of(config)
        self.stale = True
        self._sharded = inputs[0].tp_size > 1
        self._inputs, self._outputs = _Table(inputs[0]), _Table(outputs[0])
        self.weights_changed()

    def weights_changed(self) -> None:
        """The model has new weights."""
        self.stale = True
        if not self._sharded:
            self.refresh()

    def refresh(self) -> None:
        """Read the embeddings anew; collective under tensor parallelism."""
        self._inputs.read()
        self._outputs.read()
        self.stale = False

    @property
    def input_table(self) -> torch.Tensor:
        return self._inputs.weight

    @property
    def output_table(self) -> torch.Tensor:
        return self._outputs.weight

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(token_ids, self._inputs.weight)


class _Table:
    """One embedding; where it is sharded, its weight has a shape and no values before the first `read`."""

    def __init__(self, table: Any) -> None:
        self._table = table
        weight = table.weight.data
        if table.tp_size > 1:
            weight = weight.new_empty(table.org_vocab_size, weight.shape[1])
        self.weight: torch.Tensor = weight[: table.org_vocab_size]

    def read(self) -> None:
        weight = self._table.weight.data
        if self._table.tp_size > 1:
            from vllm.distributed import tensor_model_parallel_all_gather

            weight = tensor_model_parallel_all_gather(weight, dim=0)
        self.weight = weight[: self._table.org_vocab_size]


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process; `ValueError` where the engine runs in another one."""
    executor = getattr(llm.llm_engine, "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    if worker is None:
        raise ValueError(
            "this vLLM engine runs in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported, or "
            "use a server (docs/vllm.md)"
        )
    return worker.model_runner


def drafter_of(llm: Any) -> Hooks | None:
    """Our proposer inside an engine of this process; None where it has none, or another one."""
    drafter = getattr(runner_of(llm), "drafter", None)
    return drafter if isinstance(drafter, Hooks) else None


def tensor_parallel() -> tuple[int, int, Any]:
    """Rank, size and group of tensor parallelism in this process."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    return group.rank_in_group, group.world_size, group


def agree(failed: str | None) -> str | None:
    """Tell the ranks of the tensor-parallel group what went wrong on this one; returns what went wrong on any, or None."""
    _, size, group = tensor_parallel()
    if size == 1:
        return failed
    everyone: list[str | None] = [None] * size
    torch.distributed.all_gather_object(everyone, failed, group=group.cpu_group)
    return next((one for one in everyone if one is not None), None)


def reset_prefix_cache_with_new_weights(methods: tuple[str, ...]) -> None:
    """After these methods of a worker, have the engine forget what it cached under the old weights.

    The prefix cache lives in the engine's scheduler, out of a worker's reach. Running requests are put back and run again:
    vLLM forgets nothing while they hold on to it. Does nothing where workers are processes of their own.
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
    """Whether the engine's scheduler lives in the process of this worker."""
    return vllm_config.parallel_config.distributed_executor_backend in ("uni", "external_launcher")
