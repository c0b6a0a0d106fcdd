"""Replace a module's parameters and buffers by fake tensors for a trace, and restore them afterwards.

If the module's code binds a buffer to another tensor, `FakeState.rebound` has it.
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.errors import CaptureError


@dataclass
class FakeState:
    """Fake tensors in the place of a module's tensors, by canonical name."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    rebound: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Maps names of buffers to other tensors that the traced code bound to them (`self.buf = self.buf + 1`)."""


@contextlib.contextmanager
def swapped_tensors(module: nn.Module, state: FakeState) -> Generator[None]:
    """Let every parameter and buffer of the module be its fake tensor inside the block.

    Raises:
        CaptureError: the block bound a parameter anew, or a buffer to a tensor of another shape or dtype.
    """
    stand_ins = {id(param): (name, state.params[name]) for name, param in module.named_parameters()}
    stand_ins |= {id(buffer): (name, state.buffers[name]) for name, buffer in module.named_buffers()}
    slots: list[tuple[str, dict[str, Any], str, Any]] = []
    for prefix, owner in module.named_modules():
        for table in torch_internals.tensor_tables(owner):
            slots.extend((prefix, table, key, value) for key, value in table.items() if value is not None)
    try:
        for _, table, key, value in slots:
            table[key] = stand_ins[id(value)][1]
        yield
        for prefix, table, key, value in slots:
            name, stand_in = stand_ins[id(value)]
            now: Any = table[key] if key in table else None  # noqa: SIM401 (a scripted module's has no `get`)
            if now is not stand_in:
                _check_rebound(f"{prefix}.{key}".removeprefix("."), stand_in, now, name in state.params)
                state.rebound[name] = now
    finally:
        for _, table, key, value in slots:
            table[key] = value


def _check_rebound(name: str, before: Tensor, now: Any, is_param: bool) -> None:
    if is_param:
        raise CaptureError(
            f"The forward binds parameter {name} to another tensor. Parameters are sharded, so only the optimizer may "
            "change them. Compute the new value from it and use that, or make it a buffer."
        )
    if not isinstance(now, Tensor) or (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device):
        text = f"{now.dtype}{list(now.shape)} on {now.device}" if isinstance(now, Tensor) else repr(now)
        raise CaptureError(
            f"The forward turns buffer {name} from {before.dtype}{list(before.shape)} on {before.device} into {text}. "
            "A buffer keeps its shape, dtype and device. Register it with its largest shape and write into it."
        )
