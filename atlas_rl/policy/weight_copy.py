"""A copy of a weight in another form, with a check of whether it is still up to date."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class WeightCopy:
    """A converted weight, valid while the original keeps its address and version counter.

    Writing through `.data` into the same memory changes neither: a copy must not outlive the call that made it.
    """

    made: torch.Tensor
    version: int
    address: int

    @classmethod
    def of(cls, weight: torch.Tensor, made: torch.Tensor) -> WeightCopy:
        return cls(made, weight._version, weight.data_ptr())

    def is_of(self, weight: torch.Tensor) -> bool:
        return weight._version == self.version and weight.data_ptr() == self.address


def can_be_copied(weight: torch.Tensor, numel: int) -> bool:
    """Whether a weight is whole in this process and has a version counter."""
    return not weight.is_inference() and weight.numel() == numel and not hasattr(weight, "device_mesh")
