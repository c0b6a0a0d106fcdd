"""Sees a function of torch touch a shard, where the model's code meant the whole parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxzero import torch_internals
from fxzero.module.sharded_model import ShardedModel
from fxzero.torch_internals import tree_leaves

_DATA = cast(Any, Tensor.data).__get__
_SET_DATA = cast(Any, Tensor.data).__set__
_GRAD = cast(Any, Tensor.grad).__get__
_HARMLESS = frozenset(
    {
        *("__get__", "__set__", "__delete__", "__hash__", "__repr__", "__len__", "size", "dim", "numel", "nelement"),
        *("stride", "storage_offset", "is_contiguous", "element_size", "data_ptr", "untyped_storage", "get_device"),
        *("is_floating_point", "is_complex", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_"),
        *("is_same_size", "is_inference", "is_pinned", "has_names", "retain_grad"),
    }
)
"""Names of functions of a tensor that compute nothing with its elements."""
_POINTWISE = frozenset(
    {
        *("add", "sub", "mul", "div", "true_divide", "lerp", "neg", "abs", "clamp", "sqrt", "square", "addcmul"),
        *("addcdiv", "clone", "sign", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__"),
        *("__truediv__", "__neg__", "rsub"),
    }
)
"""Names of functions that give each element from the elements at its place alone."""
_IN_PLACE = frozenset({f"{name}_" for name in _POINTWISE if not name.startswith("__")}) | {
    *("copy_", "fill_", "zero_", "clamp_min_", "clamp_max_", "__imul__", "__iadd__", "__isub__", "__itruediv__"),
    "detach_",
}
"""Names of functions that change each element by the elements at its place alone."""


class TouchedError(BaseException):
    """Leaves a method that has touched a shard; no code that catches an Exception sees it."""

    def __init__(self, what: str, *, needs_graph: bool) -> None:
        super().__init__(what)
        self.what = what
        self.needs_graph = needs_graph
        """True if a gradient may come back to a parameter."""


class ShardWatch(TorchFunctionMode):
    """Raises TouchedError where a function computes with shards what their slices do not give.

    What is computed element by element from slices that lie alike on all ranks, without a graph, is a slice itself: a
    decay of weights, say. Ranks decide alike, since they may gather then.
    """

    def __init__(self, sharded: ShardedModel) -> None:
        super().__init__()
        self._sharded = sharded
        self._names = {id(param): fqn for fqn, param in sharded.params.items()}
        self._slices: dict[int, tuple[Tensor, str]] = {}
        """Tensors that have slices, and the parameter that the slices are of, by the ids of the tensors."""
        self._computed: set[int] = set()
        """Those of them that are neither the data of a parameter nor its gradient."""
        self._alike: dict[tuple[str, str], bool] = {}
        self.is_off = False
        self.before: dict[str, tuple[Tensor, Tensor]] = {}
        """The data of each parameter that was written since, and a copy of it as it was."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_off or self._sharded.is_stepping:
            return func(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        slices = [value for value in tensors if self._is_slice(value)]
        if not slices:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        is_view = func in (_DATA, _GRAD) or name == "detach"
        if name in _HARMLESS and not is_view:
            if func == _SET_DATA:
                self._keep(slices[:1])
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):  # another view: its transpose
                self._touch(slices, name, tensors)
            return result
        is_in_place = name in _IN_PLACE or torch_internals.writes_lists(name)
        fits = is_view or (self._lie_alike(slices) and len(slices) == len([each for each in tensors if each.dim()]))
        if not fits or not (is_view or is_in_place or (name in _POINTWISE and not _needs_graph(tensors))):
            self._touch(slices, name, tensors)
        if is_in_place:
            self._keep(slices)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not self._is_slice(result):
            self._slices[id(result)] = result, self._fqn_of(slices[0])
            if not is_view:
                self._computed.add(id(result))
        return result

    def _keep(self, slices: Iterable[Tensor]) -> None:
        """Keep what parameters hold that are about to be written."""
        for fqn in map(self._fqn_of, slices):
            if fqn not in self.before:
                data = self._sharded.params[fqn].data
                self.before[fqn] = data, data.clone()

    def is_computed(self, value: Any) -> bool:
        """True for a tensor that was computed from slices, and is one itself."""
        return id(value) in self._computed

    def is_on_top(self) -> bool:
        """True if no other mode was entered later."""
        return torch_internals.current_function_mode() is self

    def _is_slice(self, value: Tensor) -> bool:
        return id(value) in self._names or id(value) in self._slices

    def _fqn_of(self, value: Tensor) -> str:
        return self._names[id(value)] if id(value) in self._names else self._slices[id(value)][1]

    def _lie_alike(self, slices: list[Tensor]) -> bool:
        first, *others = dict.fromkeys(map(self._fqn_of, slices))
        for other in others:
            if (first, other) not in self._alike:
                self._alike[first, other] = self._sharded.lie_alike(first, other)
        return all(self._alike[first, other] for other in others)

    def _touch(self, slices: list[Tensor], function: str, tensors: Iterable[Tensor]) -> NoReturn:
        writes = function.endswith("_") and not function.endswith("__")  # which a graph forbids
        needs_graph = not writes and _needs_graph(tensors)
        raise TouchedError(f"{self._fqn_of(slices[0])} ({function})", needs_graph=needs_graph)


def _needs_graph(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
