"""A copy of a weight in another form, and what tells whether it still is the weight's."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class WeightCopy:
    """What was made of a weight, good as long as the weight has the address and the version counter that it had then.

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
    """Whether a weight is whole, with all its numbers in this process, and has a version counter."""
    return not weight.is_inference() and weight.numel() == numel and not hasattr(weight, "device_mesh")
