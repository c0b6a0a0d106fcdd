"""Other data parallelism around a compiled module is refused before it touches a weight."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fxzero
from fxzero.errors import FxzeroError
from fxzero.testing import run_ranks
from tests.distributed.weight_workers import assert_same_weights, net, points

DDP, CPU = nn.parallel.DistributedDataParallel, torch.device("cpu")
WRAPPERS: dict[str, Callable[[fxzero.ZeroModule, nn.Module], object]] = {
    "DistributedDataParallel": lambda zero, _: DDP(zero),
    "DistributedDataParallel of the model": lambda _, model: DDP(model),
    "DistributedDataParallel of a part": lambda zero, _: DDP(zero.get_submodule("0")),
    "DistributedDataParallel of a parent": lambda zero, _: DDP(nn.ModuleDict({"net": zero, "head": nn.Linear(3, 3)})),
    "DataParallel": lambda zero, _: nn.DataParallel(zero),
    "FullyShardedDataParallel": lambda zero, _: FullyShardedDataParallel(zero, device_id=CPU),
    "FullyShardedDataParallel of a parent": lambda zero, _: FullyShardedDataParallel(
        nn.Sequential(zero, nn.Linear(3, 3)), device_id=CPU
    ),
    "fully_shard": lambda zero, _: fully_shard(zero),
    "fully_shard of the model": lambda _, model: fully_shard(model),
}


def wrap(rank: int, world_size: int) -> None:
    for name, wrapper in WRAPPERS.items():
        model = net()
        zero = fxzero.compile(model, example=points(rank))
        with pytest.raises(FxzeroError, match=f"{name.split()[0]} around a module of fxzero.compile"):
            wrapper(zero, model)
        assert_same_weights(zero, net())
        zero(points(rank)).sum().backward()


def test_wrappers_are_refused_and_weights_stay_as_they_are() -> None:
    run_ranks(2, wrap)


def sharded_around(rank: int, world_size: int) -> None:
    zero = fxzero.compile(net(), example=points(rank))
    fully_shard(nn.Sequential(zero, nn.Linear(3, 3)))
    assert_same_weights(zero, net())


def test_fully_shard_around_a_compiled_module_leaves_that_alone() -> None:
    run_ranks(2, sharded_around)


def test_a_model_that_was_given_back_can_be_wrapped() -> None:
    model = net()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fxzero.compile(model, example=torch.ones(2, 3))
    nn.DataParallel(model)
