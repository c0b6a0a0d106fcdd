"""The return value of a model, taken apart into flat tensors and put together again after each step."""

import dataclasses
import enum
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxzero.torch_internals import (
    TreeSpec,
    attribute_key,
    register_tree_node,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum)


@dataclass(frozen=True)
class OutputSpec:
    """Structure and plain values of a model's return value."""

    treespec: TreeSpec
    leaves: tuple[Any, ...]
    """Plain values, and the class `Tensor` in the place of each tensor."""
    is_reordered: bool = False
    """Some dict in it has its keys in another order than its class gives them: a field was set later."""

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """A return value with these tensors, which have the order of `StepGraph.model_outputs`."""
        if self.leaves == (Tensor,) and self.treespec.is_leaf():
            return tensors[0]
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is Tensor else leaf for leaf in self.leaves]
        output = tree_unflatten(leaves, self.treespec)
        if self.is_reordered:
            _reorder(output, self.treespec)
        return output


def _reorder(output: Any, treespec: TreeSpec) -> bool:
    """Put keys into the order that they had; True if some had not. Values of outputs are read by position, too."""
    if treespec.is_leaf():
        return False
    children, inner = treespec.children(), list[Any]()
    is_changed = False
    if isinstance(output, OrderedDict) and isinstance(treespec.context, list):
        mapping = cast("OrderedDict[Any, Any]", output)
        pairs = zip(cast("list[Any]", treespec.context), children, strict=True)
        found = {key: child for key, child in pairs if key in mapping}  # a class may leave out what is None
        is_changed = [*mapping] != [*found]
        for key in found if is_changed else ():
            mapping.move_to_end(key)
        children, inner = [*found.values()], [mapping[key] for key in found]
    elif isinstance(output, dict):
        inner = [*cast("dict[Any, Any]", output).values()]
    elif isinstance(output, (list, tuple)):
        inner = [*cast("Sequence[Any]", output)]
    for each, child in zip(inner, children, strict=False):
        is_changed = _reorder(each, child) or is_changed
    return is_changed


def flatten_output(output: Any) -> tuple[list[Tensor], OutputSpec]:
    """The tensors of a return value and its OutputSpec.

    An object of a plain class is taken apart into its attributes. Another leaf that is neither tensor nor plain value
    becomes None.
    """
    _register_dataclasses(output)
    flat, treespec = tree_flatten(output, is_leaf=_is_leaf)
    if any(map(can_be_opened, flat)):
        flat, treespec = tree_flatten(tree_unflatten([opened(leaf) for leaf in flat], treespec), is_leaf=_is_leaf)
    tensors: list[Tensor] = []
    leaves: list[Any] = []
    dropped: list[str] = []
    for leaf in flat:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            leaves.append(Tensor)
        elif isinstance(leaf, _PLAIN):
            leaves.append(leaf)
        else:
            dropped.append(_name(output, leaf))
            leaves.append(None)
    if dropped:
        warnings.warn(
            f"The model returns {', '.join(dropped)}, which is no tensor and no plain value: a compiled step returns "
            "None in its place. Switch it off (use_cache=False for a cache), or return tensors.",
            UserWarning,
            stacklevel=2,
        )
    is_reordered = _reorder(tree_unflatten(leaves, treespec), treespec)
    return tensors, OutputSpec(treespec, tuple(leaves), is_reordered)


class _Opened:
    """An object by its attributes, as a node of a tree.

    Args:
        owner_in: attributes with a weak reference to the object that this one is an attribute of.
    """

    def __init__(self, cls: type, attributes: dict[str, Any], owner_in: tuple[str, ...]) -> None:
        self.cls, self.attributes, self.owner_in = cls, attributes, owner_in

    @property
    def context(self) -> tuple[type, tuple[str, ...], tuple[tuple[str, str], ...]]:
        """The class, its attributes, and those of attributes that refer to the object."""
        inner = [(key, value) for key, value in self.attributes.items() if isinstance(value, _Opened)]
        return self.cls, (*self.attributes,), tuple((key, name) for key, value in inner for name in value.owner_in)


def _closed(values: Iterable[Any], context: tuple[type, tuple[str, ...], tuple[tuple[str, str], ...]]) -> Any:
    """An object of the class with these attributes."""
    cls, names, referring = context
    made = object.__new__(cls)
    vars(made).update(zip(names, values, strict=True))
    for key, name in referring:
        vars(vars(made)[key])[name] = weakref.ref(made)
    return made


def _attributes(node: _Opened) -> tuple[list[Any], Any]:
    return [*node.attributes.values()], node.context


def _attributes_with_keys(node: _Opened) -> tuple[list[tuple[Any, Any]], Any]:
    return [(attribute_key(name), value) for name, value in node.attributes.items()], node.context


register_tree_node(_Opened, _attributes, _closed, flatten_with_keys_fn=_attributes_with_keys)


def can_be_opened(value: Any, depth: int = 3) -> bool:
    """True for an object of a plain class whose attributes have tensors."""
    no_objects = (Tensor, nn.Module, torch.optim.Optimizer, type, types.ModuleType, types.FunctionType)
    if isinstance(value, (*no_objects, *_PLAIN)) or _is_cache(value):
        return False
    attributes = getattr(value, "__dict__", None)
    if not depth or not isinstance(attributes, dict) or type(value).__new__ is not object.__new__:
        return False
    leaves = tree_leaves(attributes, is_leaf=_is_leaf)
    return any(isinstance(leaf, Tensor) or can_be_opened(leaf, depth - 1) for leaf in leaves)


def opened(value: Any, depth: int = 3, owner: Any = None) -> Any:
    """An object that can be opened as a node of a tree; another value as it is."""
    if not depth or not can_be_opened(value):
        return value
    attributes = vars(value)
    owner_in = tuple(key for key, each in attributes.items() if owner is not None and _refers_to(each, owner))
    attributes = {key: each for key, each in attributes.items() if key not in owner_in}
    inner = tree_map(lambda each: opened(each, depth - 1, value), attributes, is_leaf=_is_leaf)
    return _Opened(type(value), inner, owner_in)


def _refers_to(value: Any, owner: Any) -> bool:
    return isinstance(value, weakref.ReferenceType) and value() is owner


def loss_index(output: Any, tensors: Sequence[Tensor]) -> int | None:
    """Index of the tensor that the model calls `loss`, as a key, field or attribute of its return value."""
    if isinstance(output, Tensor):
        return None
    loss = cast(Any, output).get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return next((index for index, tensor in enumerate(tensors) if tensor is loss), None)


def _register_dataclasses(output: Any) -> None:
    """Register the dataclasses in a return value with pytree."""
    while True:
        leaves = tree_leaves(output, is_leaf=_is_leaf)
        unknown = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not _is_cache(leaf)}
        if not unknown:
            return
        for cls in unknown:
            torch.export.register_dataclass(cls)


def _is_leaf(value: Any) -> bool:
    """True for values that pytree must not take apart, because it cannot rebuild them."""
    return isinstance(value, torch.Size) or _is_cache(value)


def _is_cache(value: Any) -> bool:
    """True for Hugging Face's key/value caches, which some versions register as pytree nodes."""
    return any(base.__name__ == "Cache" and base.__module__.startswith("transformers.") for base in type(value).__mro__)


def _name(output: Any, leaf: Any) -> str:
    fields = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
    kind = type(leaf).__qualname__
    return next((f"{key} (a {kind})" for key, value in fields.items() if value is leaf), f"a {kind}")
