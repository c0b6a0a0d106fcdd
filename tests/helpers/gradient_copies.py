"""Measures what a backward copies into the memory of gradients, operator by operator and inside of operators."""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITE = "writes gradients"
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.contiguous.default)


class GradientWrites(TorchDispatchMode):
    """Marks every operator that writes into some storages, for the profiler, and notes its name.

    A gradient that was copied once already, into memory that is copied from, counts as `copied_before`.
    """

    def __init__(self, storages: Collection[int], params: Collection[int]) -> None:
        super().__init__()
        self._storages = storages
        self._params = params
        self._copies: dict[int, Tensor] = {}
        """Results of copies, by address; kept, so that no other tensor gets the address."""
        self.names: list[str] = []
        self.copied_before = 0
        self.added_to_zero = 0
        """Bytes of copies that make negative zeros positive: additions to the profiler."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        adds_zero = func is torch.ops.aten.add.out and args[1].numel() == 1 and not args[1].any()
        source: Tensor | None = args[0] if adds_zero else args[1] if func is torch.ops.aten.copy_.default else None
        gathers = source is not None and _address(source) in self._params
        if gathers or not any(_address(target) in self._storages for target in _written(func, args, kwargs)):
            result = func(*args, **kwargs)
            if func in _COPIES:
                self._copies[_address(result)] = result
            return result
        self.names.append(str(func))
        if source is not None and _address(source) in self._copies:
            self.copied_before += source.nbytes
        if source is not None and adds_zero:
            self.added_to_zero += source.nbytes
        with torch.profiler.record_function(WRITE):
            return func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a call writes to, also those in lists."""
    if not func._schema.is_mutable:
        return []
    declared = func._schema.arguments
    given = [args[i] if i < len(args) else kwargs.get(argument.name) for i, argument in enumerate(declared)]
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in declared]
    chosen = [value for value, is_write in zip(given, writes, strict=True) if is_write]
    return [leaf for leaf in tree_leaves(chosen) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def copied_bytes(
    backward: Callable[[], object], storages: Collection[int], params: Collection[int] = ()
) -> tuple[int, list[str]]:
    """Bytes that `backward` copies into the storages at some addresses, and the operators that wrote there.

    Counted are all `copy_` that the profiler sees there, so also those that an operator with `out=` makes inside.

    Args:
        params: the storages of parameter shards, of which a gather on the CPU copies the rank's own into its bucket.
    """
    mode = GradientWrites(storages, params)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], record_shapes=True) as profile, mode:
        backward()
    events = profile.events()
    assert events is not None
    copies = [event for event in events if event.name == "aten::copy_" and _is_inside_of_a_write(event)]
    seen = 4 * sum(math.prod(event.input_shapes[0]) for event in copies)
    return seen + mode.copied_before + mode.added_to_zero, mode.names


def _is_inside_of_a_write(event: Any) -> bool:
    while event is not None:
        if event.name == WRITE:
            return True
        event = event.cpu_parent
    return False
