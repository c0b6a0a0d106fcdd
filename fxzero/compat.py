"""Every private torch symbol that fxzero uses, in one place, with the versions it was seen in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist


def direct_call(op: Any) -> Any:
    """The builtin behind an operator overload: one Python call instead of two. `OpOverload._op`: 2.11 to 2.13."""
    return getattr(op, "_op", op)


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name of the backend that a group uses on a device, "none" if it has none there.

    `ProcessGroup._get_backend`: 2.11 to 2.13.
    """
    try:
        return cast(Any, group._get_backend(device)).name()
    except RuntimeError:
        return "none"


def all_gather_base(group: dist.ProcessGroup) -> Callable[..., dist.Work]:
    """`(full, shard)`: gather into one tensor, one Python call. `ProcessGroup._allgather_base`: 2.11 to 2.13."""
    return group._allgather_base


def reduce_scatter_base(group: dist.ProcessGroup) -> Callable[..., dist.Work]:
    """`(shard, full, options)`, as above. `ProcessGroup._reduce_scatter_base`: 2.11 to 2.13."""
    return group._reduce_scatter_base
