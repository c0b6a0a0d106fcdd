"""Finds private symbols of torch in sources, without running them.

A name is private if it begins with one underscore. It is fxzero's own if it begins with `_fxzero`, or if a class, a
function, a field or an assignment in the sources defines it. Two exceptions: a private attribute of what is imported
from torch is always torch's, and a name that torch's classes have too (`_version`) is fxzero's only on `self`, in a
class that defines it. Left out are names of operators (`torch.ops.aten._unsafe_view`), attributes of what is imported
from other libraries (`sys._getframe`), and the methods of every NamedTuple.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import fx, nn

_TORCH_CLASSES: tuple[type, ...] = (
    *(torch.Tensor, nn.Parameter, nn.Module, nn.LSTM, nn.MultiheadAttention, torch.optim.Optimizer),
    *(fx.Node, fx.Graph, fx.GraphModule, fx.Tracer, torch.autograd.Function, torch.autograd.graph.Node),
    *(torch.UntypedStorage, torch.cuda.Stream, torch.cuda.Event, dist.ProcessGroup, dist.Work),
    type(torch.ops.aten.add.Tensor),
)
_OF_CLASSES = {name for each in _TORCH_CLASSES for name in dir(each)}
_OF_OBJECTS = {*vars(nn.LSTM(1, 1)), *vars(torch.optim.SGD([torch.zeros(1)])), "_extra_state", "_metadata"}
_NAMED_TUPLE = frozenset({"_replace", "_asdict", "_fields", "_make", "_field_defaults"})
_PRIVATE = re.compile(r"_[A-Za-z]\w*")


def is_private(name: str) -> bool:
    """True for a name with one underscore in front."""
    return _PRIVATE.fullmatch(name) is not None


TORCH_NAMES = frozenset(filter(is_private, _OF_CLASSES | _OF_OBJECTS))
"""Private names of torch's classes and of their objects."""


@dataclass(frozen=True)
class Use:
    """One private symbol in a source."""

    path: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name}"


@dataclass
class _Class:
    """What a class defines and what it is derived from, by names."""

    bases: list[str]
    names: set[str] = field(default_factory=set[str])


def private_uses(sources: Mapping[str, str]) -> list[Use]:
    """The private symbols of torch in the sources, which are all that defines names of their own.

    Args:
        sources: texts of modules by path.
    """
    trees = {path: ast.parse(text) for path, text in sources.items()}
    classes: dict[str, _Class] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found = classes.setdefault(node.name, _Class([]))
                found.bases += [ast.unparse(base) for base in node.bases]
                found.names |= set(_defined(node))
    own = {name for tree in trees.values() for name in _defined(tree)}
    return [use for path, tree in trees.items() for use in _Finder(path, tree, own, classes).uses()]


def _defined(tree: ast.AST) -> Iterator[str]:
    """Names of classes and functions, of assignments, and of attributes that are assigned on self or cls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _uncast(node: ast.expr) -> ast.expr:
    """What stands in `cast(Any, ...)`."""
    is_cast = isinstance(node, ast.Call) and ast.unparse(node.func) == "cast"
    return node.args[1] if is_cast else node


def _root(node: ast.expr) -> str:
    """The name that a chain of attributes begins with; empty where it begins with something else."""
    node = _uncast(node)
    while isinstance(node, ast.Attribute):
        node = _uncast(node.value)
    return node.id if isinstance(node, ast.Name) else ""


class _Finder(ast.NodeVisitor):
    """Looks through one module."""

    def __init__(self, path: str, tree: ast.Module, own: set[str], classes: Mapping[str, _Class]) -> None:
        self.path, self.tree, self.own, self.classes = path, tree, own, classes
        self.found: list[Use] = []
        self.inside: list[_Class] = []
        self.from_torch, self.from_others, self.operators = set[str](), set[str](), {"torch.ops"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                package = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    source, name = (package or alias.name).split(".")[0], (alias.asname or alias.name).split(".")[0]
                    if source == "torch":
                        self.from_torch.add(name)
                    elif source != "fxzero":
                        self.from_others.add(name)
            elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("torch.ops"):
                self.operators |= {target.id for target in node.targets if isinstance(target, ast.Name)}

    def uses(self) -> list[Use]:
        self.visit(self.tree)
        return sorted(self.found, key=lambda use: use.line)

    def add(self, node: ast.stmt | ast.expr, name: str) -> None:
        self.found.append(Use(self.path, node.lineno, name))

    def is_torchs(self, name: str, *, of_self: bool) -> bool:
        """True for a private name that is not fxzero's own."""
        if not is_private(name) or name in _NAMED_TUPLE or name.startswith("_fxzero"):
            return False
        if name in TORCH_NAMES:
            return not (of_self and any(name in each.names for each in self.inside))
        return name not in self.own

    def visit_Import(self, node: ast.Import) -> None:
        self._imported(node, (alias.name for alias in node.names))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._imported(node, (f"{node.module}.{alias.name}" for alias in node.names))

    def _imported(self, node: ast.stmt, names: Iterable[str]) -> None:
        for name in names:
            first, *others = name.split(".")
            if first == "torch" and any(map(is_private, others)):
                self.add(node, name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.inside.append(self.classes[node.name])
        if self._derives_from_torch(node.name):
            for child in node.body:
                names = [child.name] if isinstance(child, ast.FunctionDef) else []
                if isinstance(child, ast.Assign | ast.AnnAssign):
                    targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                    names = [target.id for target in targets if isinstance(target, ast.Name)]
                for name in TORCH_NAMES.intersection(names):
                    self.add(child, f"{node.name}.{name}")
        self.generic_visit(node)
        self.inside.pop()

    def _derives_from_torch(self, name: str) -> bool:
        """True if a class has a base that the sources do not define and that is imported from torch in this module."""
        return any(
            self._derives_from_torch(base) if base in self.classes else base.split(".")[0] in self.from_torch
            for base in self.classes[name].bases
        )

    def visit_Attribute(self, node: ast.Attribute) -> None:
        whole, root = ast.unparse(node), _root(node)
        is_foreign = root in self.from_others or any(whole.startswith(f"{each}.") for each in self.operators)
        is_torchs = root in self.from_torch and is_private(node.attr)
        if not is_foreign and (is_torchs or self.is_torchs(node.attr, of_self=_is_self(node.value))):
            self.add(node, whole)
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Parts of an f-string are no names."""
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self.visit(part)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Strings: of getattr and its like, and keys of `__dict__` and vars()."""
        if isinstance(node.value, str) and self.is_torchs(node.value, of_self=False):
            self.add(node, repr(node.value))
