"""A small net with dropout, batch norm and an optional part, compiled and plain: what they do must be the same."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero


@dataclass
class Output:
    """What the net returns."""

    loss: Tensor
    logits: Tensor


class Net(nn.Module):
    """Linear, batch norm, dropout, linear; `extra` only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.extra = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, use_extra: bool = False) -> Output:
        """Returns the mean square and the values themselves."""
        hidden = self.drop(F.gelu(self.norm(self.body(x))))
        if use_extra:
            hidden = self.extra(hidden)
        logits = self.head(hidden)
        return Output(logits.square().mean(), logits)


def points(seed: int = 0, batch: int = 4) -> Tensor:
    """A batch for the net."""
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed))


def pair(model: nn.Module | None = None, **options: Any) -> tuple[fxzero.ZeroModule, nn.Module]:
    """A model compiled, and a plain copy of it."""
    if model is None:
        torch.manual_seed(0)
        model = Net()
    plain = copy.deepcopy(model)
    return fxzero.compile(model, **options), plain


def both(zero: nn.Module, plain: nn.Module, x: Tensor, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
    """What the two return for the same input and the same random numbers."""
    torch.manual_seed(seed)
    own = zero(x, *args, **kwargs)
    torch.manual_seed(seed)
    return own, plain(x, *args, **kwargs)


def assert_same(zero: nn.Module, plain: nn.Module) -> None:
    """Parameters, gradients and buffers are the same, bit for bit; world size 1, where a shard is the whole."""
    for (name, own), (other_name, other) in zip(zero.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(own.detach(), as_shard(other.detach())), f"{name} differs"
        assert (own.grad is None) == (other.grad is None), f"gradient of {name}: {own.grad} instead of {other.grad}"
        if own.grad is not None and other.grad is not None:
            assert torch.equal(own.grad, as_shard(other.grad)), f"gradient of {name} differs"
    for (name, own), (_, other) in zip(zero.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(own, other), f"buffer {name} differs"


def as_shard(full: Tensor) -> Tensor:
    """A tensor of a parameter's full shape as the shard of one rank that holds all of it."""
    return full.reshape(-1, *(1 for _ in full.shape[1:]))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state and weight decay."""
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


__all__ = ["Net", "Output", "as_shard", "assert_same", "both", "pair", "points", "sgd"]
