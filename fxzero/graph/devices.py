"""Where the parts of a rank's model state live."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Devices:
    """The device of each role that a rank's memory plays."""

    shards: torch.device
    """Of the shards of parameters and gradients."""
    compute: torch.device
    """Of gathered buckets, gradient buckets and activations: where a step runs, and the backend moves bytes."""
    optimizer: torch.device
    """Of the optimizer's state."""

    @classmethod
    def all(cls, device: torch.device) -> Devices:
        """One device for every role."""
        return cls(device, device, device)
