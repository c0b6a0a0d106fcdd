"""Which module of a model a trace failed in."""

import contextlib
import fnmatch
import random
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

import numpy as np
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


def module_of(trace: TracebackType | None, names: Mapping[int, str]) -> str | None:
    """The path of the deepest module whose method runs in a traceback; None if there is none.

    Args:
        names: paths of the model's modules, by their ids.
    """
    found = None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = names[id(owner)]
        trace = trace.tb_next
    return found


def parent_of(path: str) -> str:
    """The path of the module around another one; it is "" for the model itself."""
    return path.rpartition(".")[0]


def pattern_of(path: str) -> str:
    """A path with `*` in the place of each number: `layers.*.mlp`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def matches(path: str, patterns: Sequence[str]) -> bool:
    """True if a path is one of those that patterns stand for, in which `*` stands for a part of a path."""
    parts = path.split(".")
    split = [pattern.split(".") for pattern in patterns]
    return any(len(each) == len(parts) and all(map(fnmatch.fnmatchcase, parts, each)) for each in split)


class DrawFinder:
    """Finds the deepest module in whose forward numbers are drawn outside of torch."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self._entered: list[Any] = []
        self.found: str | None = None
        """The path of the module."""

    @contextlib.contextmanager
    def watching(self) -> Generator[None]:
        """Watch the forwards that run in the block."""
        before = register_module_forward_pre_hook(lambda module, args: self._entered.append(_states()))
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered and self._entered.pop() != _states() and self.found is None:
            self.found = self._names.get(id(module))


def _states() -> tuple[Any, ...]:
    numpy_state = cast("tuple[Any, ...]", np.random.get_state())
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2:]
