"""Replace a module's parameters and buffers by fake tensors for a trace, and restore them afterwards.

If the module's code binds a buffer to another tensor, `FakeState.rebound` has it.
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.dtensors import local_tensor
from fxzero.errors import CaptureError


@dataclass
class FakeState:
    """Fake tensors in the place of a module's tensors, by canonical name."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    rebound: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Maps names of buffers to other tensors that the traced code bound to them (`self.buf = self.buf + 1`), and names
    of parameters and buffers whose data it has set (`param.data = ...`) to themselves."""
    ignored: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Parameters that are inputs of the step."""

    @property
    def inputs(self) -> list[Tensor]:
        """What operators get of each parameter: the parameter itself, or the local tensor of a DTensor."""
        return [local_tensor(param) for param in self.params.values()]


@contextlib.contextmanager
def swapped_tensors(module: nn.Module, state: FakeState) -> Generator[None]:
    """Let every parameter and buffer of the module be its fake tensor inside the block.

    Raises:
        CaptureError: the block bound a parameter anew, or a buffer to a tensor of another shape or dtype.
    """
    params = state.params | state.ignored
    stand_ins = {id(param): (name, params[name]) for name, param in module.named_parameters()}
    stand_ins |= {id(buffer): (name, state.buffers[name]) for name, buffer in module.named_buffers()}
    slots: list[tuple[str, dict[str, Any], str, Any]] = []
    tables = [torch_internals.tensor_tables(owner) for owner in module.modules()]
    for (prefix, _), pair in zip(module.named_modules(), tables, strict=True):
        for table in pair:
            slots.extend((prefix, table, key, value) for key, value in table.items() if value is not None)
    names = [(table, set(table.keys())) for table, _ in tables]  # a scripted module's table has no iterator
    try:
        for _, table, key, value in slots:
            table[key] = stand_ins[id(value)][1]
        yield
        _check_new_names(names, state)
        for prefix, table, key, value in slots:
            name, stand_in = stand_ins[id(value)]
            now: Any = table[key] if key in table else None  # noqa: SIM401 (a scripted module's has no `get`)
            if now is not stand_in:
                _check_rebound(f"{prefix}.{key}".removeprefix("."), stand_in, now, name in params)
                state.rebound[name] = now
    finally:
        own = set(map(id, params.values()))
        for table, before in names:
            for key in [key for key, value in table.items() if key not in before and id(value) in own]:
                del table[key]
        for _, table, key, value in slots:
            table[key] = value


def _check_new_names(names: list[tuple[dict[str, Any], set[str]]], state: FakeState) -> None:
    own = {id(stand_in): name for name, stand_in in (state.params | state.ignored).items()}
    for table, before in names:
        for key in set(table.keys()) - before:
            if (name := own.get(id(table[key]))) is not None:
                raise CaptureError(
                    f"The forward gives parameter {name} another name, {key}. Parameters are sharded: read it as an "
                    "attribute of its module (self.weight) where it is used."
                )


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
