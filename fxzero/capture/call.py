"""The spec of a call, which selects its plan: the structure, the geometry of tensors, and plain values.

    tensors, spec = flatten_call(args, kwargs)      every step; no pytree for flat arguments
    plan = plans[spec]                              calls with equal specs have one graph

The values of tensors are never part of a spec. Those of other arguments are, because a trace makes them constants.
"""

import enum
import functools
from collections import UserDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxzero.capture.outputs import can_be_opened, opened
from fxzero.errors import InputMismatchError
from fxzero.torch_internals import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

_PLAIN = frozenset(
    {type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.Size, torch.layout}
    | {torch.memory_format, range, type, type(Ellipsis)}
)
"""Types of values that are hashable, immutable, and equal in meaning in every call. Floats are compared by bits."""

_CURE = (
    "Pass a tensor or a plain value (None, bool, int, float, str), or an object that has such attributes; or set it on "
    "the model before compile."
)


class TensorLeaf(NamedTuple):
    """Geometry of a tensor argument."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class PlainLeaf(NamedTuple):
    """Type and value of a plain argument; the value of a float is its hex text."""

    type: type
    value: Hashable

    @property
    def is_input(self) -> bool:
        """True for a number that is an input of the graph, whatever its value is."""
        return self.value is ANY_NUMBER

    @property
    def number(self) -> int | float:
        """The value of an int or a float."""
        return float.fromhex(cast(str, self.value)) if self.type is float else cast(int, self.value)


ANY_NUMBER = enum.Enum("AnyNumber", ["ANY"])["ANY"]
"""Stands for the value of a number that is an input of the graph."""


@dataclass(frozen=True)
class CallSpec:
    """A hashable description of one call, without any tensor."""

    structure: Hashable
    leaves: tuple[TensorLeaf | PlainLeaf, ...]
    """Leaves of the arguments, in the order of `paths`."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The place of each leaf in the call: `args[0]`, `input_ids`, `batch['x'][1]`."""
        if isinstance(self.structure, _Tree):
            return self.structure.paths
        num_args, *names = cast(tuple[Any, ...], self.structure)
        return (*(f"args[{index}]" for index in range(num_args)), *names)

    @property
    def tensor_paths(self) -> tuple[str, ...]:
        """The paths of the tensors, in the order of `flatten_call`."""
        return tuple(path for path, leaf in zip(self.paths, self.leaves, strict=True) if isinstance(leaf, TensorLeaf))

    def __str__(self) -> str:
        return ", ".join(f"{path}={_format(leaf)}" for path, leaf in zip(self.paths, self.leaves, strict=True))


class _Tree:
    """A hashable TreeSpec.

    Args:
        paths: of the leaves; default: as the TreeSpec gives them.
    """

    def __init__(self, treespec: TreeSpec, paths: tuple[str, ...] | None = None) -> None:
        self.treespec = treespec
        if paths is not None:
            self.__dict__["paths"] = paths

    def __hash__(self) -> int:
        return hash((self.treespec.num_leaves, self.treespec.num_nodes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tree) and self.treespec == other.treespec

    def __repr__(self) -> str:
        return repr(self.treespec)

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        indices = range(self.treespec.num_leaves)
        try:
            with_paths, _ = tree_flatten_with_path(tree_unflatten(indices, self.treespec))
        except Exception:  # a registered class without keys, or whose constructor refuses integers
            return tuple(f"argument {index}" for index in indices)
        return tuple(_path(keys) for keys, _ in with_paths)


def _path(keys: tuple[Any, ...]) -> str:
    """`args[0][1]` from (0, 0, 1); `batch['x']` from (1, 'batch', 'x')."""
    if keys[0].idx == 0:
        return "args" + keystr(keys[1:])
    return f"{keys[1].key}{keystr(keys[2:])}"


def _format(leaf: TensorLeaf | PlainLeaf) -> str:
    if isinstance(leaf, PlainLeaf):
        return str(leaf.value)
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"


def geometry_of(tensor: Tensor) -> TensorLeaf:
    """The geometry of a tensor that has strides."""
    return TensorLeaf(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


def _leaf_of(value: Any) -> TensorLeaf | PlainLeaf | None:
    """The leaf of an argument; None if it is neither a tensor nor a plain value.

    Raises:
        InputMismatchError: a tensor has no strides.
    """
    if isinstance(value, Tensor):
        try:
            return geometry_of(value)
        except RuntimeError as error:  # from stride()
            raise InputMismatchError(f"An input has no strides: {error}. Pass it dense (to_dense()).") from error
    if isinstance(value, float):
        return PlainLeaf(type(value), value.hex())
    return PlainLeaf(type(value), value) if type(value) in _PLAIN or isinstance(value, enum.Enum) else None


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], CallSpec]:
    """The tensors of a call, positional ones first, and the spec of the call.

    Raises:
        InputMismatchError: an argument is neither a tensor nor a plain value, or a tensor has no strides.
    """
    flat: list[Any] = [*args, *kwargs.values()]
    structure: Hashable = (len(args), *kwargs)
    leaves = [_leaf_of(value) for value in flat]
    if not all(leaves):
        flat, treespec = tree_flatten((args, dict(kwargs)))
        structure = _Tree(treespec)
        leaves = [_leaf_of(value) for value in flat]
        if not all(leaves):
            flat, structure, leaves = _flatten_opened(args, kwargs)
    tensors = [value for value in flat if isinstance(value, Tensor)]
    return tensors, CallSpec(structure, tuple(filter(None, leaves)))


def _flatten_opened(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Any], _Tree, list[TensorLeaf | PlainLeaf | None]]:
    """The leaves of arguments among which are objects of own classes, which are taken apart into their attributes.

    Raises:
        InputMismatchError: an argument, or an attribute of one, is neither a tensor nor a plain value.
    """
    with_paths, treespec = tree_flatten_with_path(open_objects(args, kwargs))
    flat, paths = [leaf for _, leaf in with_paths], tuple(_path(keys) for keys, _ in with_paths)
    leaves = [_leaf_of(value) for value in flat]
    if not all(leaves):
        index = leaves.index(None)
        raise InputMismatchError(f"{paths[index]} is a {type(flat[index]).__qualname__}. {_CURE}")
    return flat, _Tree(treespec, paths), leaves


def flatten_any(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], TreeSpec]:
    """The leaves of arguments, and their structure: objects of own classes by attributes, where there are any."""
    leaves, structure = tree_flatten((args, dict(kwargs)))
    has_objects = any(can_be_opened(leaf) for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN)))
    return tree_flatten(open_objects(args, kwargs)) if has_objects else (leaves, structure)


def open_objects(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The arguments, with objects of own classes as nodes of a tree."""
    return tree_map(_open, (args, dict(kwargs)))


def _open(leaf: Any) -> Any:
    if not can_be_opened(leaf):
        return leaf
    node = opened(leaf)
    if isinstance(leaf, UserDict):  # transformers' BatchEncoding also keeps what its tokenizer knows
        private = {key: value for key, value in node.attributes.items() if key.startswith("_")}
        node.attributes |= {key: None for key, value in private.items() if not all(map(_leaf_of, tree_leaves(value)))}
    return node


def own_objects(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The objects of own classes among arguments, and those in their attributes."""
    found: list[Any] = []
    waiting = [leaf for leaf in tree_leaves((args, dict(kwargs))) if can_be_opened(leaf)]
    while waiting:
        found.append(waiting.pop())
        waiting += [leaf for leaf in tree_leaves(vars(found[-1])) if can_be_opened(leaf)]
    return found


def name_of_ignored(fqn: str) -> str:
    """The name of an ignored parameter among the inputs of a step, which no argument has."""
    return f"self.{fqn}"


def replace_numbers(
    spec: CallSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any], numbers: Mapping[int, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with other numbers.

    Args:
        spec: of the call.
        numbers: by the index of their leaf.
    """
    if isinstance(spec.structure, _Tree):
        flat, treespec = tree_flatten(open_objects(args, kwargs))
        return tree_unflatten([numbers.get(index, leaf) for index, leaf in enumerate(flat)], treespec)
    flat = [numbers.get(index, value) for index, value in enumerate((*args, *kwargs.values()))]
    return tuple(flat[: len(args)]), dict(zip(kwargs, flat[len(args) :], strict=True))


def replace_tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with other tensors, which have the order of `flatten_call`."""
    remaining = iter(tensors)
    return tree_map_only(Tensor, lambda _: next(remaining), open_objects(args, kwargs))
