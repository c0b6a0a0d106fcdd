"""The gradient of log-probabilities by comparing each class with the label, in place of a scatter into zeros.

scatter(zeros, label, -g)         zeros are written, read and written again: logits are the largest activation
where(class == label, -g, 0)      computed where it is read
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_MEAN = 1
"""The reduction "mean", as ATen numbers it."""


def _nll_loss_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    dim = 1 if x.dim() > 1 else 0
    of_classes = [-1 if each == dim else 1 for each in range(x.dim())]
    if reduction == _MEAN:
        grad = grad / total_weight
    target = target.unsqueeze(dim)
    if x.dim() > grad.dim() > 0:
        grad = grad.unsqueeze(dim)
    if weight is not None:
        grad = grad * weight.view(of_classes)
    is_label = torch.arange(x.shape[dim], device=x.device).view(of_classes) == target
    return torch.where(is_label & (target != ignore_index), -grad, 0).to(x.dtype)


def by_comparison(node: fx.Node) -> Mapping[Any, Callable[..., Tensor]]:
    """The operator of a node and the function that computes it; empty for all but gradients of log-probabilities."""
    if node.target not in (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default):
        return {}
    return {node.target: _nll_loss_backward} if node.meta["val"].is_contiguous() else {}
