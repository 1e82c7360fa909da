"""vLLM's weight-transfer engines, extended to notify drafters. vLLM loads this module by the names in `transfer.py`."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from atlas_rl.vllm.internals.transfer import follower_of
from atlas_rl.vllm.internals.weights import load_all_or_nothing
from atlas_rl.vllm.weight_group import WeightGroup


class _TellsDrafters(WeightTransferEngine):
    """Notifies a model's drafters of a weight update, unless it updates a draft model of vLLM's own."""

    def init_transfer_engine(self, init_info: Any) -> None:
        super().init_transfer_engine(init_info)  # the backend's own engine, the next base class
        self._note_trainer()

    def start_weight_update(self) -> None:
        self._mark(whole=False)
        super().start_weight_update()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._mark(whole=True)
        self._tell()

    def _mark(self, *, whole: bool) -> None:
        follower = self._follower()
        if follower is not None:
            follower.weights_are_whole = whole

    def _note_trainer(self) -> None:
        follower = self._follower()
        if follower is not None:
            follower.num_trainers += 1

    def _tell(self) -> None:
        follower = self._follower()
        if follower is not None:
            follower.policy_updated(None)

    def _follower(self) -> Any:
        return follower_of(self.model) if self.model is self._default_model else None


class AtlasNcclEngine(_TellsDrafters, NCCLWeightTransferEngine):
    """`atlas_nccl`: vLLM's own NCCL transfer, with notified drafters."""


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """Address of the trainer's process group; workers are ranks from `rank_offset` on, of `world_size`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Names, types (`"float32"`) and shapes of the coming tensors, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class AtlasGlooEngine(_TellsDrafters):
    """`atlas_gloo`: the whole policy in one update, received completely before any weight changes; all or nothing."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _group: WeightGroup | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel, at = self.parallel_config, init_info
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank + at.rank_offset
        self._group = WeightGroup(at.master_address, at.master_port, rank, at.world_size)
        self._note_trainer()

    def start_weight_update(self) -> None:
        """Do nothing: no weight changes before everything has been received."""

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self._group is None:
            raise RuntimeError("no trainer has connected: POST /init_weight_transfer_engine comes first")
        announced = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        weights = [(name, self._group.receive(shape, getattr(torch, dtype))) for name, dtype, shape in announced]
        load_all_or_nothing(self._runner(), weights)

    def finish_weight_update(self) -> None:
        self._tell()

    def _runner(self) -> Any:
        """The parts of a model runner that loading needs. vLLM's worker and client reset the LoRA and image caches."""
        return SimpleNamespace(
            get_model=lambda: self.model,
            model_config=self.model_config,
            lora_config=None,
            reset_lora_state=lambda: None,
            maybe_remove_all_loras=lambda config: None,  # before 0.28
            reset_encoder_cache=lambda: None,
            reset_mm_cache=lambda: None,
        )

    def shutdown(self) -> None:
        self._group = None

    @classmethod
    def trainer_init(cls, *args: Any, **options: Any) -> Any:
        """Required by vLLM before 0.28, whose engines also implement the trainer's side. So is the next method."""
        raise NotImplementedError("the trainer's side is atlas_rl.vllm.weight_group.WeightGroup")

    trainer_send_weights = trainer_init
