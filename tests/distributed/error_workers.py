"""What ranks do in test_error_ranks.py: each returns the error that it met, and after how many seconds."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxzero
from fxzero.passes import default_passes
from tests.helpers.pairs import Net, points, sgd

PATIENCE = timedelta(seconds=20)


def error_of(do: Callable[[], object]) -> str:
    """`Class: text` of what it raises, within seconds."""
    started = time.monotonic()
    try:
        do()
    except fxzero.FxzeroError as error:
        assert time.monotonic() - started < 10, "too late"
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _different_model(rank: int, how: str) -> tuple[nn.Module, dict[str, Any]]:
    model, options = Net(), dict[str, Any]()
    if rank == 1:
        if how == "shape":
            model.head = nn.Linear(8, 4)
        elif how == "dtype":
            model.to(torch.float64)
        elif how == "frozen":
            model.norm.weight.requires_grad_(False)
        elif how == "parameter":
            model.more = nn.Linear(2, 2)
        elif how == "passes":
            options["passes"] = default_passes(bucket_bytes=1)
        elif how == "layout":
            options["layout"] = "interleaved"
        elif how == "memory_budget":
            options["memory_budget"] = 2**20
        elif how == "without":
            options["without"] = "fused_norm"
        elif how == "sync_init":
            options["sync_init"] = False
    return model, options


def differ(rank: int, world_size: int, how: str, when: str) -> str:
    """Rank 1 compiles something else; no parameter of any rank changes."""
    torch.manual_seed(rank)
    model, options = _different_model(rank, how)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    x = points().to(model.body.weight.dtype)
    if when == "example":
        error = error_of(lambda: fxzero.compile(model, example=x, timeout=PATIENCE, **options))
        model(x)  # it was given back
    else:
        zero = fxzero.compile(model, timeout=PATIENCE, **options)
        error = error_of(lambda: zero(x) if when == "call" else zero.state_dict())
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]), name
    return error


class Branching(Net):
    """Cannot be traced where it branches."""

    branches = False

    def forward(self, x: Tensor, use_extra: bool = False) -> Any:
        if self.branches and x.sum() > 0:
            x = x * 2
        return super().forward(x, use_extra)


def fail_alone(rank: int, world_size: int, when: str) -> str:
    """Rank 1 fails on its way while the others wait for it."""
    torch.manual_seed(0)
    model = Branching()
    optimizer = sgd(model)
    if when == "compile":
        other = torch.optim.LBFGS(model.parameters()) if rank == 1 else optimizer
        return error_of(lambda: fxzero.compile(model, optimizer=other, example=points(), timeout=PATIENCE))
    zero = fxzero.compile(model, optimizer=optimizer, timeout=PATIENCE, islands=())
    zero.branches = rank == 1 and when == "first call"
    if when == "first call":
        return error_of(lambda: zero(points()))
    zero(points()).loss.backward()
    optimizer.step()
    zero.branches = rank == 1
    zero.eval()
    with torch.no_grad():
        return error_of(lambda: zero(points()))


class Reordering(Net):
    """Uses other parameters for larger batches."""

    def forward(self, x: Tensor, use_extra: bool = False) -> Any:
        return super().forward(x, use_extra=len(x) > 4)


def meet_another_order(rank: int, world_size: int) -> str:
    """Rank 1 alone meets a shape for which the model needs other collectives."""
    torch.manual_seed(0)
    zero = fxzero.compile(Reordering(), passes=default_passes(bucket_bytes=1), timeout=PATIENCE)
    zero(points()).loss.backward()
    return error_of(lambda: zero(points(batch=5 if rank == 1 else 3)).loss.backward())


def lose_a_rank(rank: int, world_size: int, where: str) -> str:
    """Rank 1 dies between steps, or in the middle of one."""
    torch.manual_seed(0)
    zero = fxzero.compile(Net(), passes=default_passes(bucket_bytes=1), timeout=PATIENCE)
    optimizer = sgd(zero)
    zero(points()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if where == "between":
        if rank == 1:
            os._exit(3)
        return error_of(lambda: zero(points()).loss.backward())
    loss = zero(points()).loss
    if rank == 1:
        os._exit(3)
    return error_of(lambda: [loss.backward(), zero.clip_grad_norm_(1.0), zero(points())])


def compile_distributed_tensors(rank: int, world_size: int) -> str:
    """A model that another library has sharded already."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    return error_of(lambda: fxzero.compile(model))


def skip_a_rank(rank: int, world_size: int) -> str:
    """Rank 1 never makes its first call."""
    zero = fxzero.compile(Net(), timeout=timedelta(seconds=1))
    error = error_of(lambda: zero(points())) if rank != 1 else ""
    dist.barrier()
    return error


def use_wrong_groups(rank: int, world_size: int) -> str:
    """Rank 1 compiles for a group that it is not in; the others train in it."""
    group = dist.new_group([0, 2])
    torch.manual_seed(0)
    error = error_of(lambda: fxzero.compile(Net(), process_group=group)(points()).loss.backward())
    dist.barrier()
    return error
