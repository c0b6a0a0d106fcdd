"""Which module of a model a trace failed in."""

import contextlib
import fnmatch
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn

from fxzero.capture.draws import generators_of, python_states
from fxzero.capture.provenance import around_forwards


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


def is_called(module: nn.Module) -> bool:
    """False for a container that only holds modules, which has no forward."""
    return type(module).forward is not nn.Module.forward


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
    if not path:
        return "" in patterns
    return any(len(each) == len(parts) and all(map(fnmatch.fnmatchcase, parts, each)) for each in split)


class DrawFinder:
    """Finds the deepest module in whose forward numbers are drawn outside of torch."""

    def __init__(self, model: nn.Module, names: Mapping[int, str]) -> None:
        self._names, self._generators = names, generators_of(model)
        self._entered: list[Any] = []
        self.found: str | None = None
        """The path of the module."""

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Watch the forwards that run in the block."""
        return around_forwards(self._enter, self._leave)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._entered.append(python_states(self._generators))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered and self._entered.pop() != python_states(self._generators) and self.found is None:
            self.found = self._names.get(id(module))
