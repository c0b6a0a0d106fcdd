"""Train with lists of passes that nobody would write, beside training on the whole batch; workers of rank processes."""

import copy
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import FxzeroError
from fxzero.passes import Pass, default_passes

STEPS, ROWS = 2, 4


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 5), nn.Linear(5, 3, bias=False))


def random_list(seed: int) -> list[Pass]:
    """The default passes with some left out, often two exchanged, sometimes one of them once more."""
    draw = random.Random(seed)
    every = default_passes(bucket_bytes=draw.choice([1, 100, 1000]))
    passes = [each for each in every if draw.random() < 0.75]
    if len(passes) > 1 and draw.random() < 0.4:
        first, second = draw.sample(range(len(passes)), 2)
        passes[first], passes[second] = passes[second], passes[first]
    if draw.random() < 0.3:
        passes.insert(draw.randrange(len(passes) + 1), draw.choice(every))
    return passes


def train_with(rank: int, world_size: int, lists: Sequence[Sequence[Pass]]) -> list[str]:
    """For each list of passes "equal", "refused: ..." with the text of our error, or what came out wrong."""
    reference = build()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9)
    for step in range(STEPS):
        losses = [reference(part).square().sum() for part in batch(step, world_size)]
        (sum(losses[1:], start=losses[0]) / world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [outcome(rank, world_size, passes, reference) for passes in lists]


def batch(step: int, world_size: int) -> tuple[Tensor, ...]:
    """The part of each rank."""
    return torch.randn(world_size * ROWS, 7, generator=torch.Generator().manual_seed(step)).chunk(world_size)


def outcome(rank: int, world_size: int, passes: Sequence[Pass], reference: nn.Module) -> str:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    try:
        zero = fxzero.compile(model, passes=copy.copy(passes), optimizer=optimizer)
        for step in range(STEPS):
            zero(batch(step, world_size)[rank]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = zero.state_dict()
    except FxzeroError as error:
        return f"refused: {error}"
    wrong = [
        name for name, value in reference.state_dict().items() if not torch.allclose(trained[name], value, rtol=1e-5)
    ]
    return f"other values than the reference: {wrong}" if wrong else "equal"
