"""Run batch norm through operators that declare their writes to running statistics, which those of eager do not."""

from typing import Any

import torch

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
