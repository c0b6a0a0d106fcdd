"""What of a call decides which plan serves it: its structure, the geometry of its tensors and its plain values.

    tensors, spec = flatten_call(args, kwargs)      every step; no pytree for flat arguments
    plan = plans[spec]                              equal specs trace to the same graph

A tensor's values are never part of a spec; every other argument's value is, because tracing bakes it in.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxzero.errors import InputMismatchError
from fxzero.torch_internals import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_map_only, tree_unflatten

_PLAIN = frozenset(
    {type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.Size, torch.layout}
    | {torch.memory_format, range, type, type(Ellipsis)}
)
"""Types whose values are hashable, immutable, and mean the same in every call. Floats are compared by their bits."""

_CURE = "Pass a tensor or a plain value (None, bool, int, float, str), or set it on the model before compile."


class TensorLeaf(NamedTuple):
    """The geometry of a tensor among the arguments of a call."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class PlainLeaf(NamedTuple):
    """A plain value among the arguments of a call; a float by its bits."""

    type: type
    value: Hashable


@dataclass(frozen=True)
class CallSpec:
    """A hashable description of one call; holds no tensor."""

    structure: Hashable
    leaves: tuple[TensorLeaf | PlainLeaf, ...]
    """One for each argument."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Where each leaf is in the call: `args[0]`, `input_ids`, `batch['x'][1]`."""
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
    """A pytree structure that can be hashed; equal trees have equal structures."""

    def __init__(self, treespec: TreeSpec) -> None:
        self.treespec = treespec

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


def _leaf_of(tensor: Tensor) -> TensorLeaf:
    return TensorLeaf(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], CallSpec]:
    """The tensors of a call, positional ones first, and what else decides its plan.

    Raises:
        InputMismatchError: an argument is neither a tensor nor a plain value, or a tensor has no strides.
    """
    tensors: list[Tensor] = []
    leaves: list[TensorLeaf | PlainLeaf] = []
    try:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                tensors.append(value)
                leaves.append(_leaf_of(value))
                continue
            kind = type(value)
            if kind is float:
                leaves.append(PlainLeaf(float, value.hex()))
            elif kind in _PLAIN:
                leaves.append(PlainLeaf(kind, value))
            else:
                return _flatten_nested(args, kwargs)
    except RuntimeError as error:  # from stride()
        raise InputMismatchError(f"An input has no strides: {error}. Pass it dense (to_dense()).") from error
    return tensors, CallSpec((len(args), *kwargs), tuple(leaves))


def _flatten_nested(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], CallSpec]:
    flat, treespec = tree_flatten((args, dict(kwargs)))
    tree = _Tree(treespec)
    tensors: list[Tensor] = []
    leaves: list[TensorLeaf | PlainLeaf] = []
    for index, value in enumerate(flat):
        if isinstance(value, Tensor):
            tensors.append(value)
            leaves.append(_leaf_of(value))
        elif isinstance(value, float):
            leaves.append(PlainLeaf(type(value), value.hex()))
        elif type(value) in _PLAIN or isinstance(value, enum.Enum):
            leaves.append(PlainLeaf(type(value), value))
        else:
            raise InputMismatchError(f"{tree.paths[index]} is a {type(value).__qualname__}. {_CURE}")
    return tensors, CallSpec(tree, tuple(leaves))


def replace_tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other tensors, given in the order of `flatten_call`."""
    remaining = iter(tensors)
    return tree_map_only(Tensor, lambda _: next(remaining), (args, dict(kwargs)))
