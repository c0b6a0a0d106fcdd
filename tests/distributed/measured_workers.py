"""What ranks do in test_measured_ranks.py: ask for measured seconds beside predicted ones."""

import time
from typing import Any

import torch
from torch import nn

import fxzero
from fxzero.cost.measured import MEASURED_STEPS
from tests.distributed.tuner_workers import SLOW


class Sleepy(nn.Module):
    """Two linears; a rank that is late starts its second gather late."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def run(rank: int, world_size: int, options: dict[str, Any], late_s: float) -> list[str]:
    """The texts before the first, after some and after all measured steps; rank 1 comes late to each step."""
    torch.manual_seed(0)
    zero = fxzero.compile(Sleepy(), **options)

    def step() -> None:
        if rank == 1:
            time.sleep(late_s)
        zero(torch.ones(4, 8)).sum().backward()

    step()
    texts = [zero.schedule.text(measured=True)]
    for num_steps in (3, MEASURED_STEPS):
        for _ in range(num_steps):
            step()
        texts.append(zero.schedule.text(measured=True))
    return texts


def other_kinds(rank: int, world_size: int) -> list[int]:
    """Steps of no_sync(), of evaluation, and with buckets that stay are measured too: the number of measured lines."""
    torch.manual_seed(0)
    zero = fxzero.compile(Sleepy(), example=torch.ones(4, 8), memory_budget="auto", cluster=SLOW)
    numbers: list[int] = []

    def measured(step: Any) -> None:
        step()
        zero.schedule.text(measured=True)
        for _ in range(MEASURED_STEPS):
            step()
        text = zero.schedule.text(measured=True)
        assert "steps; print this again" not in text, text
        numbers.append(len(text.splitlines()))

    def accumulate() -> None:
        with zero.no_sync():
            zero(torch.ones(4, 8)).sum().backward()

    def evaluate() -> None:
        with torch.no_grad():
            zero(torch.ones(4, 8))

    measured(lambda: zero(torch.ones(4, 8)).sum().backward())
    measured(accumulate)
    measured(evaluate)
    return numbers
