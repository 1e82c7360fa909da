"""A running engine's runner, drafter, weights and embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from atlas_rl.policy.view import LogitForm, PolicyView
from atlas_rl.vllm.internals.runner import Hooks


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


def abandon(llm: Any) -> None:
    """End what a call left behind that did not come to its end; nothing happens where it did.

    A step that was cut off has scheduled tokens that were never run. What remembers them as computed has to go with their
    requests: the runner's half of the step, and the prefix cache.
    """
    left = list(llm.llm_engine.output_processor.request_states)
    if left:
        llm.llm_engine.abort_request(left, internal=True)
        runner_of(llm).execute_model_state = None
        llm.reset_prefix_cache()


def reload_weights(llm: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load new weights into the running engine and forget what was cached under the old ones.

    On CPUs through the layer-wise reload: loading into the live model fails there, because weights were packed and dropped.

    Args:
        llm: An engine in this process.
        weights: (name, tensor) pairs as in a checkpoint; read to its end, whatever happens.
    """
    runner = runner_of(llm)
    iterator = iter(weights)
    try:
        if runner.device.type == "cpu":
            runner.reload_weights(weights_iterator=iterator)
        else:
            for pair in iterator:
                runner.get_model().load_weights([pair])
    finally:
        # TRL merges adapters before the first pair and unmerges them behind the last one.
        for _ in iterator:
            pass
    llm.reset_prefix_cache()
    drafter = drafter_of(llm)
    if drafter is not None:
        drafter.weights_changed()
