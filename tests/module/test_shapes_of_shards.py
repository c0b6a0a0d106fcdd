"""A shard has as many dimensions as its parameter, so that code which groups parameters by them groups alike."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.testing import run_ranks


class Mixed(nn.Module):
    """Parameters of no, one, two and four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.one = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.norm(self.conv(x).flatten(1))) * self.scale * self.one).pow(2).mean()


RULES: dict[str, Callable[[nn.Parameter], bool]] = {
    "ndim": lambda param: param.ndim >= 2,
    "dim": lambda param: param.dim() > 1,
    "shape": lambda param: len(param.shape) != 1 and len(param.shape) > 0,
    "size": lambda param: len(param.size()) >= 4,
}


def images(rank: int) -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(rank))


def groups_by_rule(rank: int, world_size: int, rule: str, how: str) -> None:
    torch.manual_seed(0)
    plain = Mixed()
    torch.manual_seed(0)
    with torch.device("meta" if how == "meta" else "cpu"):
        model = Mixed()
    zero = fxzero.compile(model, example=images(rank) if how == "example" else None)
    if how == "meta":
        zero.load_state_dict(plain.state_dict())
    elif how == "call":
        zero(images(rank))
    of_plain, of_zero = (
        [name for name, param in module.named_parameters() if RULES[rule](param)] for module in (plain, zero)
    )
    assert of_plain == of_zero


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("how", ["example", "meta", "call"])
def test_groups_by_dimensions_are_those_of_the_plain_model(how: str, world_size: int) -> None:
    for rule in RULES:
        run_ranks(world_size, groups_by_rule, rule, how)


def decays_matrices_alone(rank: int, world_size: int) -> None:
    def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
        params = list(module.parameters())
        decayed, others = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
        return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], 0.1, weight_decay=0.5)

    torch.manual_seed(0)
    plain = Mixed()
    torch.manual_seed(0)
    zero = fxzero.compile(Mixed(), example=images(0))
    optimizers = optimizer_of(plain), optimizer_of(zero)
    for _ in range(3):
        for module, optimizer in zip((plain, zero), optimizers, strict=True):
            module(images(0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for param in zero.parameters():
        assert param.is_contiguous()
        assert all(value.shape in (param.shape, ()) for value in optimizers[1].state[param].values())
    for name, value in zero.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_weight_decay_of_matrices_alone_is_that_of_the_plain_model(world_size: int) -> None:
    run_ranks(world_size, decays_matrices_alone)
