"""Replace a module's parameters and buffers by fake tensors for a trace, and restore them afterwards.

If the module's code binds a buffer to another tensor, `FakeState.rebound` has it. If the code keeps a tensor in a plain
attribute, the trace fails, because no later step would update the attribute.
"""

import contextlib
from collections.abc import Generator, Mapping
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
            now: Any = table.get(key)
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


@contextlib.contextmanager
def unchanged_attributes(module: nn.Module) -> Generator[None]:
    """Restore attributes of the module that got a tensor inside the block, and refuse such code.

    Raises:
        CaptureError: an attribute, or a list, dict or set in one, holds a tensor that it did not hold before.
    """
    before = [(name, owner, dict(vars(owner)), _contents(owner)) for name, owner in module.named_modules()]
    found: list[tuple[str, str]] = []
    try:
        yield
    finally:
        for name, owner, attributes, contents in before:
            found.extend((name, key) for key in _restore(owner, attributes, contents))
    if found:
        name, key = found[0]
        where = f"{name}.{key}".removeprefix(".")
        raise CaptureError(
            f"The forward keeps a tensor in attribute '{key}' of module '{name}' ({type(module).__name__}: {where}). "
            "Only buffers are updated by a compiled step. Return the tensor from forward, or make it a buffer: "
            f"register_buffer('{key}', ...) in __init__ and self.{key}.copy_(...) in forward."
        )


def _contents(owner: nn.Module) -> dict[str, Any]:
    """Shallow copies of the containers among a module's attributes."""
    return {key: value.copy() for key, value in vars(owner).items() if isinstance(value, (list, dict, set))}


def _restore(owner: nn.Module, attributes: dict[str, Any], contents: dict[str, Any]) -> list[str]:
    """Undo changes of attributes that hold traced tensors; returns the names of these attributes."""
    changed: list[str] = []
    now = vars(owner)
    if isinstance(owner, nn.RNNBase):
        now.update({key: attributes[key] for key in torch_internals.RNN_CACHES if key in attributes})
    for key in [key for key, value in now.items() if value is not attributes.get(key) and _holds_tensor(value)]:
        changed.append(key)
        if key in attributes:
            now[key] = attributes[key]
        else:
            del now[key]
    for key, content in contents.items():
        container: Any = now.get(key)
        if container is attributes[key] and _holds_new_tensor(container, content):
            changed.append(_entry(key, container, content))
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
    return changed


def _entry(key: str, container: Any, content: Any) -> str:
    """The name of a changed attribute; in a table of nn.Module's own, the name of the new entry."""
    if key in torch_internals.TENSOR_TABLES and isinstance(container, Mapping):
        return next(name for name in container if name not in content)
    return key


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _holds_new_tensor(container: Any, content: Any) -> bool:
    known = {id(value) for value in _values(content)}
    return any(id(value) not in known and _holds_tensor(value) for value in _values(container))


def _holds_tensor(value: Any, depth: int = 2) -> bool:
    """True for a tensor, and for a container with a tensor at most `depth` levels deep."""
    if depth == 0 or not isinstance(value, (list, tuple, dict, set)):
        return isinstance(value, Tensor)
    return any(_holds_tensor(item, depth - 1) for item in _values(value))
