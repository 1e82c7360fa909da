"""A gloo process group of one trainer process and a server's workers, separate from their own groups."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore

_JOINING = timedelta(minutes=1)
_SENDING = timedelta(minutes=5)


class WeightGroup:
    """Sends tensors from the trainer, rank 0, to all workers. Unusable after an error.

    Args:
        host: Address of the trainer, as the workers reach it.
        port: A free port of the trainer's machine.
        rank: 0 for the trainer; workers count from 1.
        world_size: The trainer and all workers.

    Raises:
        RuntimeError: Not all members have joined within a minute, or the port is taken.
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        self._store = TCPStore(host, port, world_size, is_master=rank == 0, timeout=_JOINING)
        gloo: Any = ProcessGroupGloo  # its stubs lack the methods used below
        options = gloo._Options()
        # By default gloo listens on the address of the machine's host name, which other machines may not reach.
        own = host if rank == 0 else address_towards(host, port)
        options._devices = [gloo.create_device(hostname=own)]
        options._timeout = _JOINING
        self._group = gloo(self._store, rank, world_size, options)

    def send(self, tensor: torch.Tensor) -> None:
        """Send a tensor from rank 0 to all others, which know its shape and type; RuntimeError if a peer is gone."""
        self._broadcast(tensor.detach().cpu().contiguous())

    def receive(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Receive the next tensor from rank 0; RuntimeError if that rank is gone."""
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        self._broadcast(tensor)
        return tensor

    def _broadcast(self, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = _SENDING
        as_bytes = tensor.reshape(-1).view(torch.uint8)  # a view: gloo does not know every type
        self._group.broadcast([as_bytes], options).wait()


def address_towards(host: str, port: int) -> str:
    """The address of this machine on the route to another one; sends nothing."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as unsent:
        unsent.connect(address)
        return str(unsent.getsockname()[0])
