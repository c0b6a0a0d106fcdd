"""Compare the results of two runs of a step: bit for bit, or within a tolerance.

Bit for bit, a NaN equals any NaN, and 0.0 differs from -0.0.

Within a tolerance, two numbers of a kind (all gradients, say) may differ by the tolerance times the largest magnitude
of that kind. NaN and infinity must stand in the same places. Values that are not floating-point numbers, such as a
random state or the index of a maximum, are not compared.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from fxzero.planning.run_step import Results


def differences(before: Results, after: Results, tolerance: float = 0.0) -> Iterable[tuple[str, str]]:
    """Pairs of a value's name ("gradient of layers.0.weight") and a text that says how it differs, in order."""
    for kind, values in before.items():
        bound = tolerance * largest_magnitude(values.values()) if tolerance else None
        for name in dict.fromkeys((*values, *after[kind])):
            text = difference(values.get(name), after[kind].get(name), bound)
            if text is not None:
                yield f"{kind} {name}", text


def largest_magnitude(values: Iterable[Any]) -> float:
    """The largest finite magnitude in floating-point tensors; 0.0 if there is none."""
    magnitudes = [_wide(value).abs() for value in values if _has_floats(value)]
    return max((float(each.where(each.isfinite(), 0).max()) for each in magnitudes), default=0.0)


def difference(before: Any, after: Any, bound: float | None = None) -> str | None:
    """How two values differ, in words; None if they do not.

    Args:
        bound: the largest difference of two numbers that is allowed; None compares bits.
    """
    both_tensors = isinstance(before, Tensor) and isinstance(after, Tensor)
    if not both_tensors or (before.shape, before.dtype) != (after.shape, after.dtype):
        is_same = not both_tensors and type(before) is type(after) and before == after
        return None if is_same else f"was {_kind_of(before)} and is {_kind_of(after)}"
    where = _differing(before, after, bound)
    count = int(where.sum())
    if count == 0:
        return None
    index = tuple(where.nonzero()[0].tolist())
    was, now = before[index].item(), after[index].item()
    beyond = "" if bound is None else f" by more than {bound:.3g}"
    place = f" at {list(index)}" if index else ""
    return f"differs in {count:,} of {before.numel():,} elements{beyond}; the first{place} was {was!r} and is {now!r}"


def _differing(before: Tensor, after: Tensor, bound: float | None) -> Tensor:
    """True at the elements that differ; the tensors have one shape and dtype."""
    if not _has_floats(before):
        return before != after if bound is None else torch.zeros_like(before, dtype=torch.bool)
    if bound is None and before.is_complex():
        return _differing(before.real, after.real, None) | _differing(before.imag, after.imag, None)
    x, y = _wide(before), _wide(after)
    are_equal = (x == y) & (x.signbit() == y.signbit()) if bound is None else (x == y) | ((x - y).abs() <= bound)
    return ~(are_equal | (x.isnan() & y.isnan()))


def nan_throughout(results: Results) -> Collection[str]:
    """The names of values that are NaN in every element, in which no difference can be seen."""
    return [
        f"{kind} {name}"
        for kind, values in results.items()
        for name, value in values.items()
        if _has_floats(value) and _wide(value).isnan().all()
    ]


def _has_floats(value: Any) -> bool:
    """True for a tensor of at least one floating-point number, real or complex."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.numel() > 0


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that has all operators and represents every difference."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)
