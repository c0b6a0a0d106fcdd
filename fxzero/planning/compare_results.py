"""Compare what two runs of a step gave: bit for bit, or within a tolerance.

Bit for bit: a NaN equals any NaN, and 0.0 differs from -0.0. Within a tolerance: two numbers may differ by as much as
the tolerance times the largest magnitude among the values of the same kind, all gradients say; NaN and infinity stand
in the same places; what is no floating-point number (a random state, the index of a maximum) is not compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from fxzero.planning.run_step import Results

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differences(before: Results, after: Results, tolerance: float = 0.0) -> Iterable[tuple[str, str]]:
    """The values that differ, in order: the name of each ("gradient of layers.0.weight"), and how, in words."""
    for kind, values in before.items():
        bound = tolerance * largest_magnitude(values.values())
        for name in dict.fromkeys((*values, *after[kind])):
            text = difference(values.get(name), after[kind].get(name), bound if tolerance else None)
            if text is not None:
                yield f"{kind} {name}", text


def largest_magnitude(values: Iterable[Any]) -> float:
    """The largest finite magnitude in floating-point tensors; 0.0 if there is none."""
    tensors = [value for value in values if isinstance(value, Tensor) and _is_floating(value) and value.numel()]
    magnitudes = [_wide(tensor).abs() for tensor in tensors]
    return max((float(each.where(each.isfinite(), 0).max()) for each in magnitudes), default=0.0)


def difference(before: Any, after: Any, bound: float | None = None) -> str | None:
    """How two values differ, in words; None if they do not.

    Args:
        bound: the most by which two numbers may differ; None compares bits.
    """
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None if _is_same_object(before, after) else f"was {_kind_of(before)} and is {_kind_of(after)}"
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return f"was {_kind_of(before)} and is {_kind_of(after)}"
    where = differing(before, after, bound)
    count = int(where.sum())
    if count == 0:
        return None
    index = tuple(where.nonzero()[0].tolist())
    was, now = before[index].item(), after[index].item()
    beyond = "" if bound is None else f" by more than {bound:.3g}"
    place = f" at {list(index)}" if index else ""
    return f"differs in {count:,} of {before.numel():,} elements{beyond}; the first{place} was {was!r} and is {now!r}"


def differing(before: Tensor, after: Tensor, bound: float | None = None) -> Tensor:
    """True at the elements that differ, of two tensors of one shape and dtype."""
    if not _is_floating(before):
        return before != after if bound is None else torch.zeros_like(before, dtype=torch.bool)
    if bound is None:
        where = _bits(before) != _bits(after)
        return where.any(-1) if before.is_complex() else where
    x, y = _wide(before), _wide(after)
    return ~((x == y) | ((x - y).abs() <= bound) | (x.isnan() & y.isnan()))


def nan_throughout(results: Results) -> Collection[str]:
    """The names of values that are NaN in every element, so that no difference can be seen in them."""
    return [
        f"{kind} {name}"
        for kind, values in results.items()
        for name, value in values.items()
        if isinstance(value, Tensor) and _is_floating(value) and value.numel() and _wide(value).isnan().all()
    ]


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(tensor: Tensor) -> Tensor:
    """In a type that has all operators and holds every difference."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _bits(tensor: Tensor) -> Tensor:
    """The bits of each number as an integer, one and the same for every NaN; two integers for a complex number."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    bits = tensor.view(_INTEGER_OF_SIZE[tensor.dtype.itemsize])
    is_nan = tensor.float().isnan() if tensor.dtype.itemsize == 1 else tensor.isnan()
    return bits.masked_fill(is_nan, torch.iinfo(bits.dtype).max)


def _is_same_object(before: Any, after: Any) -> bool:
    return type(before) is type(after) and not isinstance(before, Tensor) and before == after


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)
