"""Forward hooks on parts of a model that only observe: they run in each step, on the tensors that it computed.

what a hook does in the trace                                what happens
returns a value                                              it is part of the graph
sets attributes, or changes containers                       each step does the same; see `writes.py`
returns None and leaves nothing that is seen, or fails,      each step calls it after its forward, with the values of
as `.item()` and `.numpy()` do on traced tensors             its arguments there
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.reads import Reads
from fxzero.capture.writes import Before, Output, Template
from fxzero.errors import CaptureError
from fxzero.torch_internals import tree_flatten


@dataclass(frozen=True)
class Observer:
    """A hook to call after each forward."""

    hook: Callable[..., Any]
    module: nn.Module
    arguments: Template
    """The arguments behind the module."""

    def run(self, tensors: Sequence[Any]) -> None:
        """Call the hook.

        Args:
            tensors: the flat outputs of the step.

        Raises:
            CaptureError: the hook returns a value, which would change what the forward computed.
        """
        if self.hook(self.module, *self.arguments.filled(tensors)) is not None:
            name = getattr(self.hook, "__qualname__", type(self.hook).__name__)
            raise CaptureError(
                f"The hook {name} on a {type(self.module).__name__} returns a value that depends on the values of "
                "tensors. Compute the value with tensor operations, or return None."
            )


class Observers:
    """The calls of hooks in one trace that must be repeated in each step."""

    def __init__(self, reads: Reads, before: Before) -> None:
        self._reads, self._before = reads, before
        self.calls: list[tuple[Callable[..., Any], nn.Module, tuple[Any, ...]]] = []

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """Watch the forward hooks of the model's parts in the block."""
        tables = [(module, table) for module in model.modules() for table in torch_internals.forward_hooks_of(module)]
        originals = [(table, dict(table)) for _, table in tables if table]
        for module, table in tables:
            table.update({key: self._watched(module, hook) for key, hook in table.items()})
        try:
            yield
        finally:
            for table, original in originals:
                table.update({key: hook for key, hook in original.items() if key in table})

    def _watched(self, module: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            contents, num_set = self._before.contents(), len(self._reads.set_slots)
            try:
                result = hook(*arguments)
            except Exception:
                self._before.roll_back(contents)
                result = None
            else:
                if result is not None or len(self._reads.set_slots) > num_set or self._before.differs_from(contents):
                    return result
            self.calls.append((hook, module, arguments[1:]))
            return result

        return watched

    def found(self, index_of: Callable[[Tensor], Output | None]) -> tuple[Observer, ...]:
        """The observers.

        Args:
            index_of: gives the output that stands for a traced tensor.
        """
        observers: list[Observer] = []
        for hook, module, arguments in self.calls:
            flat, treespec = tree_flatten(arguments)
            leaves = [(isinstance(leaf, Tensor) and index_of(leaf)) or leaf for leaf in flat]
            observers.append(Observer(hook, module, Template(tuple(leaves), treespec)))
        return tuple(observers)
