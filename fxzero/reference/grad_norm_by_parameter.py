"""The gradient norm parameter by parameter, each norm read by the host."""

import math
from functools import reduce

import torch

from fxzero.comm.base import Comm
from fxzero.runtime.clip import (
    checked,
    not_finite,
)
from fxzero.runtime.gradients import Gradients


def clip_each_grad_norm_(
    gradients: Gradients | None, comm: Comm, max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> torch.Tensor:
    """The same parameter by parameter, each norm read by the host: the reference to measure `clip_grad_norm_` against.

    Both differ by the rounding of their sums.

    Source: DeepSpeed before PR 1453 (`get_grad_norm_direct`).
    """
    gradients, norm_type = checked(gradients, norm_type)
    segments = gradients.settle()
    if not segments:
        return torch.zeros(())
    total, is_sum = 0.0, norm_type != math.inf
    for grad in gradients.each:
        norm = torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64).item() if grad.numel() else 0.0
        total = total + norm**norm_type if is_sum else _larger(total, norm)
    over_ranks = torch.tensor(total, dtype=torch.float64, device=segments[0].device)
    comm.all_reduce(over_ranks, "sum" if is_sum else "max")
    total = over_ranks.item() ** (1 / norm_type if is_sum else 1.0)
    if error_if_nonfinite and not math.isfinite(total):
        raise not_finite(norm_type)
    scale = max_norm / (total + 1e-6)
    if not scale >= 1.0:
        for grad in gradients.each:
            grad.mul_(scale)
    dtypes = [torch.promote_types(segment.dtype, torch.float32) for segment in segments]
    return over_ranks.new_tensor(total, dtype=reduce(torch.promote_types, dtypes))


def _larger(one: float, other: float) -> float:
    """The maximum, which is NaN if either is."""
    return one if math.isnan(one) else max(other, one)
