"""Hooks that only observe: they run in each step, on the tensors that it computed.

what a hook of forward does in the trace                     what happens
returns a value, or writes into a tensor that was there      it is part of the graph
sets attributes, or changes containers                       each step does the same; see `writes.py`
returns None and leaves nothing that is seen, or fails,      each step calls it after its forward, with the values of
as `.item()` and `.numpy()` do on traced tensors             its arguments there

what a hook of backward does
returns a value, or writes into a tensor                     it is part of the graph; state that it leaves is refused
returns None, or fails                                       each step calls it after its backward
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.provenance import Recorder
from fxzero.capture.reads import Reads
from fxzero.capture.writes import Before, Output, Template, output_in
from fxzero.errors import CaptureError
from fxzero.graph.aliasing import memory_of, written_by
from fxzero.torch_internals import tree_flatten, tree_leaves


@dataclass(frozen=True)
class Observer:
    """A hook to call after each forward, or after each backward."""

    hook: Callable[..., Any]
    arguments: Template

    def run(self, tensors: Sequence[Any]) -> None:
        """Call the hook, unless a tensor that it observes was not computed.

        Args:
            tensors: the flat outputs of forward, or the gradients that hooks of backward observe.

        Raises:
            CaptureError: the hook returns a value, which would change what the step computed.
        """
        if any(tensors[leaf.index] is None for leaf in self.arguments.leaves if isinstance(leaf, Output)):
            return
        if self.hook(*self.arguments.filled(tensors)) is not None:
            raise CaptureError(
                f"The hook {name_of(self.hook)} returns a value that depends on the values of tensors. Compute the "
                "value with tensor operations, or return None."
            )


def name_of(hook: Callable[..., Any]) -> str:
    """The name of a hook."""
    return getattr(hook, "__qualname__", type(hook).__name__)


class Observers:
    """The calls of hooks in one trace that must be repeated in each step."""

    def __init__(self, reads: Reads, before: Before) -> None:
        self._reads, self._before = reads, before
        self.num_set_data = 0
        """Times that forward has set the data of a tensor (`param.data = ...`)."""
        self._of_forward: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._of_backward: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """Watch the hooks of the model's parts, and those of all modules, that a forward in the block meets."""
        modules = [*model.modules()]
        of_forward = [table for module in modules for table in torch_internals.forward_hooks_of(module)]
        of_backward = [table for module in modules for table in torch_internals.backward_hooks_of(module)]
        global_forward, global_backward = torch_internals.global_hooks()[:2], torch_internals.global_hooks()[2:]
        tables = [(table, self.of_forward) for table in (*of_forward, *global_forward)]
        tables += [(table, self.of_backward) for table in (*of_backward, *global_backward)]
        originals = [(table, dict(table)) for table, _ in tables if table]
        for table, watched in tables:
            for key, hook in table.items():
                if not _is_of_the_trace(hook):
                    self._reads.follow(hook)
                    table[key] = watched(hook)
        try:
            yield
        finally:
            for table, original in originals:
                table.update({key: hook for key, hook in original.items() if key in table})

    def add_check(self, check: Callable[[Tensor], None], conditions: tuple[Tensor]) -> None:
        """Let each step call a function with traced tensors after its forward."""
        self._of_forward.append((check, conditions))

    def of_forward(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook of forward that notes its calls that observe."""

        def watched(*arguments: Any) -> Any:
            then, num_set = self._before.now(), len(self._reads.set_slots)
            writes = self._writes_since(arguments)
            try:
                result = hook(*arguments)
            except Exception:
                if writes():
                    raise
                self._before.go_back_to(then)
                result = None
            else:
                leaves_state = len(self._reads.set_slots) > num_set or self._before.differs_from(then)
                if result is not None or leaves_state or writes():
                    return result
            self._of_forward.append((hook, arguments))
            return result

        return watched

    def _writes_since(self, arguments: tuple[Any, ...]) -> Callable[[], bool]:
        """A function that tells whether a tensor has been written since now: one of these, or another older one."""
        versions, num_set_data, graph = _versions(arguments), self.num_set_data, torch_internals.traced_graph()
        last = next(reversed(graph.nodes))

        def writes() -> bool:
            new = dict.fromkeys(itertools.takewhile(lambda node: node is not last, reversed(graph.nodes)))
            targets = [memory_of(target) for node in new for target in written_by(node)]
            has_written = versions != _versions(arguments) or num_set_data != self.num_set_data
            return has_written or any(target not in new for target in targets)

        return writes

    def of_backward(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook of backward that notes its calls that observe.

        Raises:
            CaptureError: the hook is one of torch's own, which keeps what it counts where no trace sees it.
        """
        if getattr(hook, "__module__", "") == "torch.autograd.graph":
            raise CaptureError(
                "The forward calls torch.autograd.graph.register_multi_grad_hook, which counts gradients as they come. "
                "Register a hook on each tensor (tensor.register_hook)."
            )

        def watched(*arguments: Any) -> Any:
            writes, then = self._writes_since(arguments), self._before.now()
            found, set_slots = dict(self._reads.found), set(self._reads.set_slots)
            try:
                with self._reads.following():
                    result = hook(*arguments)
            except Exception:
                if writes():
                    raise
                result = None
            if result is not None or writes():
                return result
            self._before.go_back_to(then)
            self._reads.found, self._reads.set_slots = found, set_slots  # it reads what it finds in each step
            self._of_backward.append((hook, arguments))
            return None

        return watched

    def found(self, index_of: Callable[[Tensor], Output | None]) -> tuple[Observer, ...]:
        """The observers of forward.

        Args:
            index_of: gives the output that stands for a traced tensor.
        """
        return _observers(self._of_forward, index_of)

    def found_in_backward(self) -> tuple[tuple[Observer, ...], list[Tensor]]:
        """The observers of backward, and the gradients that they observe."""
        observed: list[Tensor] = []
        return _observers(self._of_backward, functools.partial(output_in, observed)), observed


def _observers(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], index_of: Callable[[Tensor], Output | None]
) -> tuple[Observer, ...]:
    observers: list[Observer] = []
    for hook, arguments in calls:
        if any(_is_traced(each) for each in _closure_of(hook)):
            raise CaptureError(
                f"The hook {name_of(hook)} reads a tensor of forward that is none of its arguments. A hook that only "
                "observes gets the tensors of each step as arguments; let it compute with these alone."
            )
        flat, treespec = tree_flatten(arguments)
        leaves = [(isinstance(leaf, Tensor) and index_of(leaf)) or leaf for leaf in flat]
        observers.append(Observer(hook, Template(tuple(leaves), treespec)))
    return tuple(observers)


def _closure_of(hook: Any) -> list[Any]:
    """Values that a hook holds: the variables of its closure, its defaults, and arguments that it was given before."""
    if isinstance(hook, functools.partial):
        return [*_closure_of(hook.func), *tree_leaves((hook.args, hook.keywords))]
    function = getattr(hook, "__func__", hook)
    held: list[Any] = [*(getattr(function, "__defaults__", None) or ())]
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return tree_leaves(held)


def _is_of_the_trace(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__module__", "") == Recorder.__module__


def _is_traced(value: Any) -> bool:
    return torch_internals.is_symbolic(value) or torch_internals.is_fake(value)


def _versions(arguments: tuple[Any, ...]) -> int:
    """A number that changes when a tensor among the arguments of a hook is written."""
    return torch_internals.num_changes([leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)])
