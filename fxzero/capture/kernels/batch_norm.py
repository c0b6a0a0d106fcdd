"""Run batch norm through operators that declare their writes to running statistics, which those of eager do not."""

from typing import Any

import torch

from fxzero import torch_internals

aten = torch.ops.aten

_CPU = aten.native_batch_norm.default
_GPU = (aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default)


def writes_undeclared(op: Any) -> bool:
    """True for an operator that writes running statistics without declaring it in its schema."""
    return op is _CPU or op in _GPU


def run_declared(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of `op`, from the same kernel, called through operators that declare their writes."""
    x, weight, bias, mean, var, training, *rest = args
    if kwargs or not training or mean is None or var is None:
        return op(*args, **kwargs)
    if op is _CPU:
        return aten._native_batch_norm_legit.default(x, weight, bias, mean, var, training, *rest)
    new_mean, new_var = aten.clone.default(mean), aten.clone.default(var)
    result = op(x, weight, bias, new_mean, new_var, training, *rest)
    aten.copy_.default(mean, new_mean)
    aten.copy_.default(var, new_var)
    return result


_ON_CPU = (
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
    aten.native_batch_norm.default,
    aten.native_batch_norm_backward.default,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
)
_OF_SECOND = (aten.native_batch_norm_backward.default, aten.native_group_norm_backward.default)
"""Operators whose second argument is what the first is of the others."""


def with_real_strides(op: Any, args: tuple[Any, ...], result: Any) -> Any:
    """The result of an operator with the strides that its kernel gives it, where its fake version has others.

    Batch norm and group norm on the CPU make their first result in the memory format of their input, contiguous if it
    has none; the fake versions keep the strides of the input, or make it contiguous.
    """
    if op not in _ON_CPU:
        return result
    x, first = args[1 if op in _OF_SECOND else 0], result[0]
    if x.device.type != "cpu" or not isinstance(first, torch.Tensor):
        return result
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    is_last = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]) and not x.is_contiguous()
    strides = torch_internals.strides_of(x.shape, channels_last=is_last)
    if all(size <= 1 or a == b for size, a, b in zip(x.shape, first.stride(), strides, strict=True)):
        return result
    return (aten.as_strided.default(first, list(x.shape), list(strides)), *result[1:])
