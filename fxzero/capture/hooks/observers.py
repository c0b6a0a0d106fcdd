"""Tells in a trace which hooks only observe; each step calls those, on the tensors that it computed.

what a hook does in the trace                              what happens
returns a value, or writes into a tensor that was there,   it is part of the graph
registers a hook, or changes what the forward reads
keeps a tensor through which the model is differentiated   the state that it leaves is left behind by each step
anything else, or it fails, as `.item()` and `.numpy()`    each step calls it at its place, where it reads and sets
do on traced tensors                                       the state that is there

One that reads what the forward has set before it is called after the forward, when that is there.
"""

import contextlib
import functools
import io
import itertools
import logging
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzero import torch_internals
from fxzero.capture.hooks.observer import Forget, HookModes, Lent, Observer, Refresh, name_of
from fxzero.capture.hooks.operators import place
from fxzero.capture.provenance import Recorder
from fxzero.capture.reads import Reads, ReadsMoment
from fxzero.capture.slots import is_container
from fxzero.capture.writes import Before, Moment, Output, Template, output_in
from fxzero.errors import CaptureError
from fxzero.graph.aliasing import memory_of, written_by
from fxzero.torch_internals import tree_flatten, tree_leaves

_OWN_PARTS_OF_TORCH = ("torch.nn.utils.", "torch.ao.")
"""Modules of hooks that set what forward reads."""


class TracedHooksError(Exception):
    """Ends a trace that took hooks for observers whose state the forward reads.

    Args:
        hooks: their ids.
    """

    def __init__(self, hooks: set[int]) -> None:
        super().__init__("the forward reads what hooks set that it is traced without")
        self.hooks = hooks


class RemovedHookError(CaptureError):
    """A hook that is part of the graph was removed while it was traced, so that the next call is without it."""


@dataclass
class _Call:
    """A call of a hook in a trace, until it is known whether it observes."""

    hook: Callable[..., Any]
    arguments: tuple[Any, ...]
    then: Moment
    reads: ReadsMoment
    changed: frozenset[Any]
    """What the forward had set before it."""
    modes: HookModes
    last: fx.Node
    versions: tuple[int, ...]
    """What changes when a tensor among the arguments is written, or made to require grad."""
    num_set_data: int
    num_hooked: int
    num_parts: int
    num_bound: int


class Observers:
    """The calls of hooks in one trace that must be repeated in each step."""

    def __init__(self, reads: Reads, before: Before, device_type: str) -> None:
        self._reads, self._before, self._device_type = reads, before, device_type
        self.num_set_data = 0
        """Times that forward has set the data of a tensor (`param.data = ...`)."""
        self.num_hooked = 0
        """Times that forward has registered a hook on a tensor."""
        self.traced: frozenset[int] = frozenset()
        """Ids of hooks that set what forward reads."""
        self._after_forward: list[tuple[Callable[..., Any], tuple[Any, ...], HookModes]] = []
        self._placed: list[tuple[Observer, list[Tensor], list[tuple[int, ...]]]] = []
        """Observers at their place, the traced tensors that they get, and the versions of these then."""
        self._called: list[Any] = []
        """What nodes of the graph call."""
        self._modules: dict[int, nn.Module] = {}
        self._in_backward = False
        self._removed: list[tuple[dict[Any, Any], Any, Any]] = []
        """Table, key and hook of each hook that was removed while the forward or the backward ran."""

    @property
    def are_there(self) -> bool:
        """True if a forward that has run has met hooks or checks."""
        return bool(self._called or self._after_forward or self.num_hooked)

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """Watch the hooks of the model's parts, and those of all modules, that a forward in the block meets."""
        modules = [*model.modules()]
        self._modules = {id(module): module for module in modules}
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
                    table[key] = watched(hook, table, key)
        try:
            yield
        finally:
            for table, original in originals:
                gone = [(table, key, hook) for key, hook in original.items() if key not in table]
                self._removed += [each for each in gone if not _is_of_the_trace(each[2])]
                table.update({key: hook for key, hook in original.items() if key in table})

    def add_check(self, check: Callable[[Tensor], None], conditions: tuple[Tensor]) -> None:
        """Let each step call a function with traced tensors after its forward."""
        self._after_forward.append((check, conditions, HookModes.now(self._device_type)))

    # -- hooks of forward ----------------------------------------------------------------------------------------

    def of_forward(self, hook: Callable[..., Any], table: dict[Any, Any], key: Any) -> Callable[..., Any]:
        """A hook of forward that notes its calls that observe.

        Args:
            table: has the hook under the key.
        """

        def watched(*arguments: Any) -> Any:
            if getattr(hook, "__module__", "").startswith(_OWN_PARTS_OF_TORCH):
                return hook(*arguments)
            call = self._begin(hook, arguments)
            own = table.get(key)
            result, error, seen, printed = self._try(call)
            if self._is_traced(call) or result is not None:
                return _as_tried(result, error, printed)
            left = self._before.changes_since(call.then)
            is_late = not call.changed.isdisjoint(seen)
            keeps_gradient = any(map(_is_attached, tree_leaves(list(left.values()))))
            is_needed = id(hook) in self.traced
            if is_needed or (error is None and left and (is_late or keeps_gradient)):
                return _as_tried(None, error, printed)
            self._go_back(call)
            if key not in table and own is not None:  # it has removed itself, as it will in the step
                table[key] = own
            if is_late or (keeps_gradient and not self._in_backward):
                self._after_forward.append((hook, arguments, call.modes))
                return None
            self._reads.observed.update(dict.fromkeys(left, id(hook)))
            self._place(call, self._lent(seen))
            return None

        return watched

    def _begin(self, hook: Callable[..., Any], arguments: tuple[Any, ...]) -> _Call:
        graph = torch_internals.traced_graph()
        return _Call(
            hook, arguments, self._before.now(), self._reads.now(),
            frozenset() if self._in_backward else self._before.changed_now() | self._reads.set_slots,
            HookModes.now(self._device_type), next(reversed(graph.nodes)), _versions(arguments), self.num_set_data,
            self.num_hooked, self._before.num_parts, self._reads.num_bound,
        )  # fmt: skip

    def _try(self, call: _Call) -> tuple[Any, Exception | None, set[Any], str]:
        """What a hook returns or raises in the trace, what it reads, and what it prints."""
        printed = io.StringIO()
        with self._reads.trial() as seen, contextlib.redirect_stdout(printed), _no_logging():
            try:
                with self._reads.following():
                    return call.hook(*call.arguments), None, seen, printed.getvalue()
            except Exception as error:
                return None, error, seen, printed.getvalue()

    def _is_traced(self, call: _Call) -> bool:
        """True if a call that is over is part of the graph: it wrote into tensors, or registered something."""
        if self.num_set_data != call.num_set_data or self.num_hooked != call.num_hooked:
            return True
        if self._before.num_parts > call.num_parts or self._reads.num_bound != call.num_bound:
            return True
        if _versions(call.arguments) != call.versions:
            return True
        if any(map(_is_structure, self._before.changes_since(call.then).values())):
            return True
        new = dict.fromkeys(_made_since(call.last))
        return any(memory_of(target) not in new for node in new for target in written_by(node))

    def _go_back(self, call: _Call) -> None:
        for node in _made_since(call.last):
            if "val" not in node.meta and not node.users:  # it failed
                node.graph.erase_node(node)
        self._before.go_back_to(call.then)
        self._reads.go_back_to(call.reads)  # it reads what it finds in each step

    def _lent(self, seen: set[Any]) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Parameters and buffers of modules that a hook has read: table, key, traced value."""
        lent: list[tuple[dict[str, Any], str, Tensor]] = []
        for owner, name in [each for each in seen if isinstance(each, tuple) and each[0] in self._modules]:
            for table, tensors in torch_internals.tensors_of(self._modules[owner]).items():
                names = tensors if name == table else [name]
                lent += [
                    (tensors, key, tensors[key])
                    for key in names
                    if isinstance(tensors.get(key), Tensor) and _is_traced(tensors[key])
                ]
        return lent

    def _place(self, call: _Call, lent: Sequence[tuple[dict[str, Any], str, Tensor]] = ()) -> None:
        """Let each step call a hook here."""
        self.refresh()
        tensors: list[Tensor] = []
        flat, treespec = tree_flatten(call.arguments)
        leaves = [
            output_in(tensors, leaf) if isinstance(leaf, Tensor) and _is_traced(leaf) else torch_internals.pinned(leaf)
            for leaf in flat
        ]
        num_given = len(tensors)
        held = tuple(Lent(table, key, output_in(tensors, value).index, _trains(value)) for table, key, value in lent)
        attached = frozenset(i for i in range(num_given) if call.modes.grad and tensors[i].requires_grad)
        observer = Observer(call.hook, Template(tuple(leaves), treespec), call.modes, attached, held)
        self._placed.append((observer, tensors, [_versions((each,)) for each in tensors]))
        self._call_here(observer, tensors)

    def _call_here(self, called: Any, tensors: Sequence[Tensor]) -> None:
        self._called.append(called)
        with self._reads.muted():
            place(called, tensors)

    def refresh(self) -> None:
        """Bring up to date what hooks got that has been written in place since."""
        for observer, tensors, versions in self._placed:
            now = [_versions((each,)) for each in tensors]
            changed = tuple(index for index, version in enumerate(now) if version != versions[index])
            if changed:
                versions[:] = now
                observer.refreshed.update(changed)
                self._call_here(Refresh(observer, changed), [tensors[index] for index in changed])

    def end_forward(self) -> None:
        """The forward is over."""
        self.refresh()
        if refreshed := [observer for observer, *_ in self._placed if observer.refreshed]:
            self._call_here(Forget(refreshed), [])
        self._placed.clear()
        self._in_backward = True
        self._check_conflicts()

    def _check_conflicts(self) -> None:
        if self._reads.conflicts:
            raise TracedHooksError(set(self._reads.conflicts))

    # -- hooks of backward ---------------------------------------------------------------------------------------

    def of_backward(self, hook: Callable[..., Any], table: Any = None, key: Any = None) -> Callable[..., Any]:
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
            call = self._begin(hook, arguments)
            result, error, seen, printed = self._try(call)
            if self._is_traced(call) or result is not None:
                if self._reads.in_backward is not None:
                    self._reads.in_backward.update(seen)
                return _as_tried(result, error, printed)
            self._reads.observed.update(dict.fromkeys(self._before.changes_since(call.then), id(hook)))
            self._go_back(call)
            self._place(call, self._lent(seen))
            return None

        return watched

    # -- after the trace -----------------------------------------------------------------------------------------

    def found(self, index_of: Callable[[Tensor], Output | None]) -> tuple[Observer, ...]:
        """The observers to call after forward.

        Args:
            index_of: gives the output that stands for a traced tensor.
        """
        observers: list[Observer] = []
        for hook, arguments, modes in self._after_forward:
            _check_closure(hook)
            flat, treespec = tree_flatten(arguments)
            leaves = [(isinstance(leaf, Tensor) and index_of(leaf)) or torch_internals.pinned(leaf) for leaf in flat]
            observers.append(Observer(hook, Template(tuple(leaves), treespec), modes))
        return tuple(observers)

    def check(self) -> None:
        """Look at the hooks that observe, at the end of the trace.

        Raises:
            CaptureError: one reads traced tensors past its arguments.
            RemovedHookError: one was removed; those are put back.
            TracedHooksError: the forward reads what some set.
        """
        self._check_conflicts()
        if self._removed:
            for table, key, hook in self._removed:
                table[key] = hook
            raise RemovedHookError(
                f"The hook {name_of(self._removed[0][2])} is removed while it runs, or by the forward, and it is part "
                "of the compiled step, which would go on with it. Remove it between calls (handle.remove()); a hook "
                "that returns None and writes into no tensor may remove itself."
            )
        for called in self._called:
            if isinstance(called, Observer):
                _check_closure(called.hook)


def _as_tried(result: Any, error: Exception | None, printed: str) -> Any:
    """Let a hook that is part of the graph have done what it did."""
    sys.stdout.write(printed)
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def _no_logging() -> Generator[None]:
    """Log nothing in the block: a hook that observes runs again, in the step."""
    level = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(level)


def _check_closure(hook: Callable[..., Any]) -> None:
    if any(_is_traced(each) for each in _closure_of(hook)):
        raise CaptureError(
            f"The hook {name_of(hook)} reads a tensor of forward that is none of its arguments. A hook that only "
            "observes gets the tensors of each step as arguments; let it compute with these alone."
        )


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


def reads_values(op: Any) -> bool:
    """True for an operator that gives a number, or a shape, that follows the values of tensors."""
    return torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags


def _is_of_the_trace(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__module__", "") == Recorder.__module__


def _is_traced(value: Any) -> bool:
    return torch_internals.is_symbolic(value) or torch_internals.is_fake(value)


def _is_attached(value: Any) -> bool:
    """True for a traced tensor through which the model could be differentiated, and for an object that holds one."""
    if isinstance(value, Tensor):
        return torch_internals.is_fake(value) and value.requires_grad
    held = vars(value).values() if hasattr(value, "__dict__") and not callable(value) else ()
    return any(isinstance(each, Tensor) and _is_attached(each) for each in held)


def _is_structure(value: Any) -> bool:
    """True for what stays from the first trace: submodules, functions."""
    values = list(value) if is_container(value) else [value]
    return any(isinstance(each, nn.Module) or callable(each) for each in values)


def _made_since(last: fx.Node) -> list[fx.Node]:
    """The nodes behind another one in its graph, the newest first."""
    return list(itertools.takewhile(lambda node: node is not last, reversed(last.graph.nodes)))


def _trains(value: Tensor) -> bool | None:
    return value.requires_grad if isinstance(value, nn.Parameter) else None


def _versions(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """Numbers that change when a tensor among the arguments of a hook is written, or made to require grad."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return torch_internals.num_changes(tensors), sum(tensor.requires_grad for tensor in tensors)
