"""Where a model holds its tensors: every name under which a module registers a parameter or a buffer.

A tied parameter is one entry with several slots; a tensor that is put into the entry is in all of them.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fxzero import torch_internals


def join(path: str, name: str) -> str:
    """The name of a member of the module at `path`; the root's path is empty."""
    return f"{path}.{name}" if path else name


class Slot(NamedTuple):
    """One name under which a module registers a parameter or a buffer."""

    module: nn.Module
    table: dict[str, Tensor | None]
    """The module's own table of parameters, or of buffers."""
    name: str
    fqn: str


@dataclass
class Entry:
    """One parameter or buffer, with every slot that holds it; the first slot gives its canonical name."""

    tensor: Tensor
    is_param: bool
    slots: list[Slot] = field(default_factory=list[Slot])

    @property
    def fqn(self) -> str:
        return self.slots[0].fqn

    def put(self, tensor: Tensor) -> None:
        """Register another tensor in every slot; a buffer stays as persistent as it was."""
        for slot in self.slots:
            slot.table[slot.name] = tensor

    def like(self, device: torch.device | str) -> Tensor:
        """An uninitialised, contiguous tensor of the same class, shape, dtype and attributes, on `device`."""
        value = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, device=device)
        if self.is_param:
            value = nn.Parameter(value, requires_grad=self.tensor.requires_grad)
        vars(value).update(vars(self.tensor))
        return value


class ParamTables:
    """The tables of parameters of some modules, and what they held when this object was made."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        tables: list[Any] = [torch_internals.tensor_tables(module)[0] for module in modules]
        self._now = [table for table in tables if isinstance(table, dict) and table]  # a scripted module has none
        self._then = [dict(table) for table in self._now]
        self._of_one_element = [
            (table, name, param)
            for table in self._now
            for name, param in table.items()
            if param is not None and param.numel() == 1
        ]

    def are_unchanged(self) -> bool:
        """True if the tables hold the same objects."""
        try:
            is_equal = self._now == self._then  # identity settles it, entry by entry
        except RuntimeError:  # other tensors have no truth value, except those of one element
            return False
        return is_equal and all([table[name] is param for table, name, param in self._of_one_element])


def entries(model: nn.Module) -> list[Entry]:
    """All parameters and buffers of the model in registration order, each once."""
    found: dict[int, Entry] = {}
    for path, module in model.named_modules():
        parameters, buffers = torch_internals.tensor_tables(module)
        for is_param, table in ((True, parameters), (False, buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    entry = found.setdefault(id(tensor), Entry(tensor, is_param))
                    entry.slots.append(Slot(module, table, name, join(path, name)))
    return list(found.values())


@contextmanager
def standing_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> Generator[None]:
    """Let other tensors stand where the model holds those of these canonical names, inside of the block.

    In the place of a parameter stands a Parameter that shares memory with the tensor.
    """
    held = [entry for entry in entries(model) if entry.fqn in tensors]
    try:
        for entry in held:
            entry.put(_as_registered(entry, tensors[entry.fqn]))
        yield
    finally:
        for entry in held:
            entry.put(entry.tensor)


def _as_registered(entry: Entry, tensor: Tensor) -> Tensor:
    if not entry.is_param:
        return tensor
    param = nn.Parameter(tensor, requires_grad=entry.tensor.requires_grad)
    vars(param).update(vars(entry.tensor))
    return param


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The unregistered tensors among a module's attributes by name, also those in lists, tuples and dicts."""
    for name, value in vars(module).items():
        if name in (*torch_internals.TENSOR_TABLES, torch_internals.MODULE_TABLE):
            continue
        items = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, dict):
            items = cast("dict[Any, Any]", value).values()
        yield from ((name, item) for item in items if isinstance(item, Tensor))
