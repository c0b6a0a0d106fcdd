"""Operators whose results have other strides than their fake versions say, unless their arguments have equal ones.

Their arguments get the strides that the kernel gives its result, by a copy where they have others. That changes no
number: these operators compute element by element, or make their arguments contiguous themselves.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_LIKE_AN_ARGUMENT: dict[Any, tuple[int, tuple[int, ...]]] = {
    **dict.fromkeys(
        (
            aten.softplus_backward.default, aten.hardsigmoid_backward.default, aten.hardtanh_backward.default,
            aten.hardswish_backward.default, aten.logit_backward.default, aten.xlogy.Tensor, aten.copysign.Tensor,
            aten.div.Tensor_mode, aten.floor_divide.default, aten.binary_cross_entropy.default,
        ),
        (0, (1,)),
    ),
    aten.elu_backward.default: (0, (5,)),
    aten.binary_cross_entropy_backward.default: (1, (0, 2)),
}  # fmt: skip
"""The argument whose strides the result has, and those that need the same."""
_CONTIGUOUS: dict[Any, tuple[int, ...]] = {
    aten.mse_loss_backward.default: (0, 1, 2),
    aten.smooth_l1_loss_backward.default: (0, 1, 2),
    aten.huber_loss_backward.default: (0, 1, 2),
    aten._log_softmax_backward_data.default: (0, 1),  # pyright: ignore[reportPrivateUsage]
    aten.native_layer_norm_backward.default: (0, 1),
}
"""Arguments that must be contiguous, as the result is."""


def with_equal_strides(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an operator, copied where its fake version would take their strides for those of the result."""
    if op in _CONTIGUOUS:
        chosen, like = _CONTIGUOUS[op], None
    elif op in _LIKE_AN_ARGUMENT:
        leader, chosen = _LIKE_AN_ARGUMENT[op]
        like = args[leader]
    else:
        return args
    return tuple(
        _copied(each, like) if index in chosen and isinstance(each, Tensor) else each for index, each in enumerate(args)
    )


def _copied(tensor: Tensor, like: Any) -> Tensor:
    """A tensor with the strides of another of its shape; contiguous if there is none."""
    if like is None:
        if tensor.is_contiguous():
            return tensor
        return aten.clone.default(tensor, memory_format=torch.contiguous_format)
    if not isinstance(like, Tensor) or tensor.shape != like.shape or tensor.stride() == like.stride():
        return tensor
    order = sorted(range(like.dim()), key=lambda dim: (-like.stride(dim), dim))
    if not _is_dense(like, order):  # an expanded gradient, say, which leaves the strides to the others
        return tensor
    copied = aten.clone.default(aten.permute.default(tensor, order), memory_format=torch.contiguous_format)
    return aten.permute.default(copied, [order.index(dim) for dim in range(like.dim())])


def _is_dense(tensor: Tensor, order: list[int]) -> bool:
    expected = 1
    for dim in reversed(order):
        if tensor.size(dim) != 1 and tensor.stride(dim) != expected:
            return False
        expected *= tensor.size(dim)
    return True
