"""Where a model holds its tensors: every name under which a module registers a parameter or a buffer.

A tied parameter is one entry with several slots; what is put into the entry is in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxzero import torch_internals


def join(path: str, name: str) -> str:
    """The name of a member of the module at `path`; the root's path is empty."""
    return f"{path}.{name}" if path else name


@dataclass(frozen=True)
class Slot:
    """One name under which a module registers a parameter or a buffer."""

    module: nn.Module
    is_param: bool
    name: str
    fqn: str

    def get(self) -> Tensor | None:
        return self._table.get(self.name)

    def put(self, tensor: Tensor | None) -> None:
        """Register another tensor under this name; a buffer stays as persistent as it was."""
        self._table[self.name] = tensor

    @property
    def _table(self) -> dict[str, Tensor | None]:
        parameters, buffers = torch_internals.tensor_tables(self.module)
        return parameters if self.is_param else buffers


@dataclass
class Entry:
    """One parameter or buffer, with every slot that holds it; the first is its canonical one."""

    tensor: Tensor
    slots: list[Slot] = field(default_factory=list[Slot])

    @property
    def fqn(self) -> str:
        return self.slots[0].fqn

    @property
    def is_param(self) -> bool:
        return self.slots[0].is_param

    def put(self, tensor: Tensor) -> None:
        for slot in self.slots:
            slot.put(tensor)

    def like(self, device: torch.device | str) -> Tensor:
        """An uninitialised tensor of the same kind and attributes, contiguous, on `device`."""
        value = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, device=device)
        if self.is_param:
            value = nn.Parameter(value, requires_grad=self.tensor.requires_grad)
        vars(value).update(vars(self.tensor))
        return value


def entries(model: nn.Module) -> list[Entry]:
    """All parameters and buffers of the model, tied ones once, in registration order."""
    found: dict[int, Entry] = {}
    for path, module in model.named_modules():
        parameters, buffers = torch_internals.tensor_tables(module)
        for is_param, table in ((True, parameters), (False, buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    entry = found.setdefault(id(tensor), Entry(tensor))
                    entry.slots.append(Slot(module, is_param, name, join(path, name)))
    return list(found.values())


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a module's attributes that are not registered, also those in lists, tuples and dicts."""
    for name, value in vars(module).items():
        if name in (*torch_internals.TENSOR_TABLES, torch_internals.MODULE_TABLE):
            continue
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple, dict)):
            items = cast("dict[Any, Any]", value).values() if isinstance(value, dict) else value
            yield from ((name, item) for item in items if isinstance(item, Tensor))
