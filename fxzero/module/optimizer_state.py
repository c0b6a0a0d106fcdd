"""Move the state of an optimizer into one contiguous buffer, once it is there.

torch.optim makes its state (exp_avg and so on) in the first step, tensor by tensor, wherever the allocator has room.
Moved together right after it, it fragments nothing, and the allocator is asked for nothing from there on.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from fxzero.graph.layout import ALIGNMENT_BYTES, align
from fxzero.memory.lifetimes import storage_view


def rehome_state(optimizer: torch.optim.Optimizer, params: Collection[int]) -> int:
    """Put every state tensor of a shard's shape into one buffer, one tensor at a time.

    On the CPU a tensor's memory is given back before the next is moved, and the buffer's pages come with its use, so
    the excess is one tensor.

    Args:
        params: the ids of the Parameter objects whose state is meant.

    Returns:
        The bytes of the buffer; 0 if there was nothing to move, or two devices to move it on.
    """
    found: list[tuple[dict[str, Any], str]] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) in params:
                state: dict[str, Any] = optimizer.state.get(param, {})
                found += [(state, key) for key, value in state.items() if _is_like(value, param)]
    devices = {state[key].device for state, key in found}
    if len(devices) != 1:
        return 0
    nbytes = sum(align(state[key].nbytes, ALIGNMENT_BYTES) for state, key in found)
    device = devices.pop()
    storage = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
    offset = 0
    with torch.no_grad():
        for state, key in found:
            value = state[key]
            home = storage_view(storage, offset, value.numel(), value.dtype, device)
            home.copy_(value)
            offset += align(value.nbytes, ALIGNMENT_BYTES)
            state[key] = home
            del value
    return nbytes


def _is_like(value: object, shard: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shard.shape and value.is_contiguous()
