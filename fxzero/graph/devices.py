"""The devices on which the parts of a rank's model state live."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Devices:
    """The device of each part of a rank's memory."""

    shards: torch.device
    """Device of the shards of parameters and gradients."""
    compute: torch.device
    """Device on which a step runs: of gathered buckets, gradient buckets and activations."""
    optimizer: torch.device
    """Device of the optimizer's state."""

    @classmethod
    def all(cls, device: torch.device) -> Devices:
        """One device for every role."""
        return cls(device, device, device)
