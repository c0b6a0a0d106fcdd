"""gelu and silu by sigmoid, which takes a CPU a fourth of the time of tanh, and which forward and backward share.

    gelu(x, "tanh") = x / 2 * (1 + tanh(u)) = x * sigmoid(2 u)    with u = sqrt(2 / pi) * (x + 0.044715 x^3)

`1 + tanh(u)` would lose digits where tanh is near -1. Half precision is computed in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

_SCALE = 2 * (2 / torch.pi) ** 0.5
_CUBIC = 0.044715


def _gelu(x: Tensor, *, approximate: str) -> Tensor:
    wide = _wide(x)
    return (wide * _tanh_gate(wide)).to(x.dtype)


def _gelu_backward(grad: Tensor, x: Tensor, *, approximate: str) -> Tensor:
    wide = _wide(x)
    gate = _tanh_gate(wide)
    inner = wide * (_SCALE + 3 * _SCALE * _CUBIC * (wide * wide))
    return (_wide(grad) * gate * (1 + inner * (1 - gate))).to(grad.dtype)


def _silu(x: Tensor) -> Tensor:
    wide = _wide(x)
    return (wide * torch.sigmoid(wide)).to(x.dtype)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    wide = _wide(x)
    gate = torch.sigmoid(wide)
    return (_wide(grad) * gate * (1 + wide * (1 - gate))).to(grad.dtype)


def _tanh_gate(x: Tensor) -> Tensor:
    return torch.sigmoid(x * (_SCALE + _SCALE * _CUBIC * (x * x)))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


_FUNCTIONS: Mapping[Any, Callable[..., Tensor]] = {
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.gelu_backward.default: _gelu_backward,
    torch.ops.aten.silu.default: _silu,
    torch.ops.aten.silu_backward.default: _silu_backward,
}


def by_sigmoid(node: fx.Node) -> Mapping[Any, Callable[..., Tensor]]:
    """The operator of a node and the function that computes it; empty for operators that are not made of sigmoid."""
    is_exact_gelu = "gelu" in str(node.target) and node.kwargs.get("approximate", "none") == "none"
    return {} if is_exact_gelu or node.target not in _FUNCTIONS else {node.target: _FUNCTIONS[node.target]}
