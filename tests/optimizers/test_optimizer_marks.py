"""Optimizer state knows whose shards it belongs to: other ranks' state is refused on all ranks before a step."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxzero
from fxzero.errors import FxzeroError, OptimizerError, RankMismatchError
from fxzero.testing import run_ranks
from tests.distributed.weight_workers import points


class Even(nn.Module):
    """One parameter, of which two ranks have shards of equal shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(8, 64) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w).pow(2).mean()


def make(rank: int, *, lazy: bool = False) -> tuple[fxzero.ZeroModule, torch.optim.Optimizer]:
    model = Even()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return fxzero.compile(model, optimizer=optimizer, example=None if lazy else points(rank)), optimizer


def train(zero: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        zero(points(rank, step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def resume(rank: int, world_size: int, source: str, lazy: bool) -> None:
    zero, optimizer = make(rank)
    train(zero, optimizer, rank, range(2))
    weights, saved = copy.deepcopy(zero.state_dict()), [copy.deepcopy(optimizer.state_dict())]
    train(zero, optimizer, rank, range(2, 4))
    if source == "rank 0":
        dist.broadcast_object_list(saved, 0)
    model = Even()
    model.load_state_dict(weights)
    other = torch.optim.AdamW(model.parameters(), lr=1e-2)
    resumed = fxzero.compile(model, optimizer=other, example=None if lazy else points(rank))
    if source == "own" or rank == 0 or source == "rank 0":
        other.load_state_dict(saved[0])
    if source == "own":
        train(resumed, other, rank, range(2, 4))
        expected, got = zero.state_dict(), resumed.state_dict()
        assert torch.equal(got["w"], expected["w"])
    else:
        names = "that of rank 0 of 2" if source == "rank 0" else "rank 0: AdamW has loaded state"
        with pytest.raises(RankMismatchError, match=names):
            train(resumed, other, rank, range(2, 4))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("source", ["own", "rank 0"])
def test_a_rank_resumes_from_its_own_state_alone(source: str, lazy: bool) -> None:
    run_ranks(2, resume, source, lazy)


def test_state_that_was_loaded_on_one_rank_alone_is_refused() -> None:
    run_ranks(2, resume, "own on rank 0", False)


def swapped_between_steps(rank: int, world_size: int) -> None:
    zero, optimizer = make(rank)
    train(zero, optimizer, rank, range(2))
    states: list[Any] = [None] * world_size
    dist.all_gather_object(states, optimizer.state_dict())
    optimizer.load_state_dict(states[1 - rank])
    zero(points(rank)).backward()
    with pytest.raises(FxzeroError, match=r"rank 0: The state that was loaded into AdamW is that of rank 1 of 2"):
        optimizer.step()


def test_state_that_is_loaded_later_is_checked_too() -> None:
    run_ranks(2, swapped_between_steps)


def test_state_of_other_buckets_is_refused() -> None:
    zero, optimizer = make(0)
    train(zero, optimizer, 0, range(1))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["fxzero_shards_0"] = "rank 0 of 4, slices 0123456789ab"
    optimizer.load_state_dict(saved)
    zero(points(0)).backward()
    with pytest.raises(OptimizerError, match="is that of rank 0 of 4, slices 0123456789ab; the shards here are those"):
        optimizer.step()


def test_an_optimizer_of_two_models_has_a_mark_for_each() -> None:
    first, second = (fxzero.compile(Even(), example=points(0)) for _ in range(2))
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1)
    for _ in range(2):
        (first(points(0)) + second(points(1))).backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert {key for key in optimizer.param_groups[0] if "fxzero" in key} == {"fxzero_shards_0", "fxzero_shards_1"}
