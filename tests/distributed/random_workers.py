"""What ranks do in test_random_ranks.py: draw in the forward of a model that is large enough to be measured."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxzero

NUM_STEPS = 3


def generator_states() -> list[Tensor]:
    """The states of the generators of torch, Python and numpy."""
    numpy_state: Any = np.random.get_state()
    others = [random.getstate()[1], numpy_state[1].tolist()]
    return [torch.get_rng_state(), *map(torch.tensor, others)]


def losses_and_states(rank: int, call: Callable[[Tensor], Tensor], after_backward: Callable[[], Any]) -> list[Tensor]:
    """The loss of each step, each followed by the states of the generators, all seeded with the rank."""
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    results: list[Tensor] = []
    for step in range(NUM_STEPS):
        loss = call(torch.full((4, 512), 0.1 * (step + 1))).square().mean()
        loss.backward()
        after_backward()
        results += [loss.detach(), *generator_states()]
    return results


def compiled_and_replicated(rank: int, world_size: int, example: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The results of a compiled model with dropout, whose costs are measured, and of a replicated one."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 1024), nn.Dropout(0.3), nn.Linear(1024, 512))
        return model, torch.optim.SGD(model.parameters(), 0.1)

    model, optimizer = build()
    batch = (torch.ones(4, 512),) if example else None
    zero = fxzero.compile(model, optimizer=optimizer, example=batch)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    compiled = losses_and_states(rank, zero, step)
    plain, plain_optimizer = build()

    def reduce_and_step() -> None:
        for parameter in plain.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    replicated = losses_and_states(rank, plain, reduce_and_step)
    assert zero.schedule.timing.predicted_step_s > 0
    return compiled, replicated
