"""Models of which a compiled copy is compared with plain PyTorch."""

import os
from typing import Any

import torch
from torch import Tensor, nn

import fxzero


class Mixed(nn.Module):
    """Draws, writes buffers, has a frozen parameter, and one that some ranks alone reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 5)
        self.norm, self.rare = nn.BatchNorm1d(9), nn.Parameter(torch.ones(5))
        self.second.bias.requires_grad_(False)

    def forward(self, x: Tensor, with_rare: bool = False) -> Tensor:
        x = self.second(nn.functional.dropout(self.norm(self.first(x)).relu(), 0.3))
        return (x * self.rare if with_rare else x).square().mean()


class Counting(nn.Module):
    """Computes something else in each call of the process."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        Counting.calls += 1
        return {"loss": self.linear(x).sum() * Counting.calls}


def build() -> tuple[nn.Module, dict[str, Any]]:
    """For the command: each rank has another batch."""
    rank = int(os.environ.get("RANK", "0"))
    return Mixed(), {"x": torch.randn(4, 7, generator=torch.Generator().manual_seed(rank)), "with_rare": rank == 0}


def build_counting() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return Counting(), (torch.ones(2, 4),), {}


def verify(rank: int, world_size: int) -> str:
    """Bit for bit on ranks, from other weights and batches on each; the model is left as it is."""
    torch.manual_seed(rank)
    model = Mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {"x": torch.randn(4, 7), "with_rare": rank == 0}
    state = torch.get_rng_state()
    result = fxzero.verify(model, batch)
    result.raise_if_different()
    assert result.ok
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    narrow = fxzero.verify(model, batch, reduce_dtype=torch.bfloat16, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert not narrow.ok
    assert fxzero.verify(model, batch, reduce_dtype=torch.bfloat16, tolerance=0.5).ok
    return f"{result}\n{narrow}"
