"""Labels each node of the graph being traced with the module and the source line that made it.

Hooks around every module's forward record the running module. At each change, the nodes made since the last change get
the label of the module that ran. In backward, each autograd node calls a hook before it runs, and its nodes get the
label of the module that made the autograd node in forward. Modules that run inside of an autograd node, as in the
recomputation of a checkpoint, label their own nodes.
"""

import bisect
import contextlib
import functools
import linecache
import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fxzero import torch_internals
from fxzero.graph.nodes import META_KEY, NodeInfo, Role

_TORCH = os.path.dirname(torch.__file__) + os.sep
_FXZERO = os.path.dirname(os.path.dirname(__file__)) + os.sep
_MODELS = _FXZERO + "models" + os.sep
_TRACER = os.path.join(os.path.dirname(__file__), "joint.py")
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep


@functools.cache
def is_user_file(filename: str) -> bool:
    """True for source files outside torch, fxzero and Python's own library."""
    if filename in ("<string>", "<frozen runpy>") or filename.startswith("<eval_with_key>"):
        return False
    if filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename:
        return False
    return not filename.startswith(_TORCH) and (not filename.startswith(_FXZERO) or filename.startswith(_MODELS))


@contextlib.contextmanager
def around_forwards(before: Callable[..., None], after: Callable[..., None]) -> Generator[None]:
    """Call functions before and after the forward of every module that runs in the block, after a failing one too."""
    handles = (
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Labels the nodes of one graph while it is being made."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._graph = graph
        self._names = {id(submodule): name for name, submodule in reversed([*module.named_modules()])}
        self._base = ""
        self._running: list[str] = []
        self._changes: list[tuple[int, str]] = [(0, "")]
        """Sequence number of the next autograd node at each change, and the module that runs from there on."""
        self._last_with_line: fx.Node | None = None
        self.in_backward = False

    @property
    def current(self) -> str:
        """The path of the running module."""
        return self._running[-1] if self._running else self._base

    def label(self, role: Role = Role.COMPUTE, fqn: str | None = None) -> None:
        """Label every node made since the last call with a role and a module; None: the running module."""
        made_here = NodeInfo(role, self.current if fqn is None else fqn)
        for node in reversed(self._graph.nodes):
            if META_KEY in node.meta:
                break
            node.meta[META_KEY] = NodeInfo(Role.CONSTANT) if node.op == "get_attr" else made_here

    def label_line(self) -> None:
        """Label the newest nodes with the running line of the model's code."""
        if self.in_backward:
            return
        line = ""
        for node in reversed(self._graph.nodes):
            if node is self._last_with_line or node.op == "placeholder":
                break
            line = line or self._user_line()
            node.meta["stack_trace"] = line
        self._last_with_line = next(iter(reversed(self._graph.nodes)), None)

    def _user_line(self) -> str:
        frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
        while frame is not None:
            filename = frame.f_code.co_filename
            if is_user_file(filename):
                code = linecache.getline(filename, frame.f_lineno).strip()
                return f'File "{filename}", line {frame.f_lineno}, in {frame.f_code.co_name}\n    {code}'
            if frame.f_code.co_name == "call_module" and filename == _TRACER:
                return ""
            frame = frame.f_back
        return ""

    @contextlib.contextmanager
    def following(self, unseen: Callable[[Any], Any] = lambda function: function) -> Generator[None]:
        """Record the running module inside the block.

        Args:
            unseen: makes the functions that do so invisible to who watches what the forward runs.
        """
        with around_forwards(unseen(self._enter), unseen(self._leave)):
            yield

    def _change(self) -> None:
        if not self.in_backward:
            self._changes.append((torch_internals.next_sequence_number(), self.current))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.label()
        self._running.append(self._names.get(id(module), self.current))
        self._change()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.label()
        if self._running:
            self._running.pop()
        self._change()

    @contextlib.contextmanager
    def backward_from(self, outputs: list[Tensor]) -> Generator[None]:
        """Label nodes with the module whose backward runs, in the autograd graph of these outputs."""
        self.label()
        self.in_backward = True
        self._base = ""
        handles = [
            node.register_prehook(self._stand_for(self._maker(torch_internals.sequence_number(node))))
            for node in autograd_nodes(outputs)
        ]
        try:
            yield
        finally:
            self.label()
            for handle in handles:
                handle.remove()

    def _maker(self, sequence: int) -> str:
        """The module that was running when the autograd node with this sequence number was made."""
        return self._changes[bisect.bisect_right(self._changes, sequence, key=lambda change: change[0]) - 1][1]

    def _stand_for(self, name: str) -> Any:
        def prehook(grads: Any) -> None:
            self.label()
            self._running.clear()
            self._base = name

        return prehook


def autograd_nodes(outputs: Iterable[Tensor], *, with_leaves: bool = False) -> list[Any]:
    """Every node of the autograd graph of these tensors.

    Args:
        with_leaves: also those that accumulate gradients of leaves.
    """
    found: dict[Any, None] = dict.fromkeys(output.grad_fn for output in outputs if output.grad_fn is not None)
    pending = list(found)
    while pending:
        node = pending.pop()
        for following, _ in node.next_functions:
            if following is not None and following not in found:
                found[following] = None
                pending.append(following)
    return [node for node in found if with_leaves or node.name() != "torch::autograd::AccumulateGrad"]


def reached_by_gradients(outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of some tensors to which gradients go from the outputs."""
    nodes = autograd_nodes(outputs, with_leaves=True)
    leaves = [node.variable for node in nodes if node.name() == "torch::autograd::AccumulateGrad"]
    reached = set(map(id, (*nodes, *leaves, *outputs)))
    return [each for each in tensors if not reached.isdisjoint((id(each), id(each.grad_fn)))]


def runs_python(outputs: list[Tensor]) -> bool:
    """True if the backward of these tensors runs code of an autograd.Function."""
    return any(isinstance(node, FunctionCtx) for node in autograd_nodes(outputs))
