"""What ranks do in test_tuner_ranks.py: train a model that is large enough to be tuned."""

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.cost.model import Cluster, Device, Link
from fxzero.module.tuning_rounds import MEASURED_STEPS, WARM_STEPS
from fxzero.passes import default_passes
from fxzero.testing import engine_of

NUM_STEPS = WARM_STEPS + MEASURED_STEPS + 3
SLOW = Cluster(Device(1e10, 1e10, 5e-6), Link(1e7, 2e-4, 1e-9))


def make_model(width: int = 320, depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())))


def make_batch(step: int, rank: int, *, uneven: bool = False) -> torch.Tensor:
    rows = 4 + 2 * rank if uneven else 4
    return torch.randn(rows, 320, generator=torch.Generator().manual_seed(100 * step + rank))


def train(rank: int, num_steps: int, *, uneven: bool = False, disturb: bool = False, **options: Any) -> dict[str, Any]:
    """Train, and say what was chosen; `disturb` changes the choice before it is made again, so that plans are too."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zero = fxzero.compile(model, optimizer=optimizer, **options)
    tuner, sharded = engine_of(zero).maker.tuning, engine_of(zero).sharded
    losses = list[float]()
    for step in range(num_steps):
        loss = zero(make_batch(step, rank, uneven=uneven)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if disturb and step == 5 and tuner.cluster is not None:
            sharded.recipe = dataclasses.replace(sharded.recipe, prefetch_bytes=1, reduce_bytes=1)
    layout = sharded.shards.layout  # type: ignore[union-attr]
    return {
        "losses": losses,
        "params": {name: value.clone() for name, value in zero.state_dict().items()},
        "schedule": zero.schedule.text(),
        "cluster": tuner.cluster,
        "recipe": sharded.recipe,
        "measured": dict(tuner._by_name),
        "buckets": [bucket.fqns for bucket in layout.buckets],
        "timing": None
        if tuner.cluster is None
        else (zero.schedule.timing.predicted_step_s, zero.schedule.timing.ratio),
    }


def tuned(rank: int, world_size: int, uneven: bool, disturb: bool) -> dict[str, Any]:
    return train(rank, NUM_STEPS, uneven=uneven, disturb=disturb)


def untuned(rank: int, world_size: int, uneven: bool) -> dict[str, Any]:
    return train(rank, NUM_STEPS, uneven=uneven, passes=default_passes())


def on_nodes(rank: int, world_size: int, across: Any, tunes: bool) -> dict[str, Any]:
    """Two nodes of two ranks; the choice is changed before it is made again, so that plans are too."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    options = {} if tunes else {"passes": default_passes()}
    return train(rank, NUM_STEPS, uneven=True, disturb=tunes, mesh=mesh, across=across, **options)


def for_a_cluster(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    return train(rank, 2, cluster=SLOW, **options)


def optimizer_seconds(rank: int, world_size: int) -> float:
    """What an optimizer was measured to take that steps after every third backward only."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zero = fxzero.compile(model, optimizer=optimizer)
    for step in range(NUM_STEPS):
        zero(make_batch(step, rank)).pow(2).mean().backward()
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return engine_of(zero).maker.tuning._optimizer_s


def small(rank: int, world_size: int) -> bool:
    zero = fxzero.compile(nn.Linear(8, 8))
    zero(torch.ones(2, 8)).sum().backward()
    return engine_of(zero).maker.tuning.cluster is None


def fails_in_capture(rank: int, world_size: int) -> str:
    """Rank 1 cannot trace its model: the others must not wait for a link to it."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = make_model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) if rank == 0 or x.sum() > 0 else x

    try:
        fxzero.compile(Branching(), islands=())(make_batch(0, rank))
    except fxzero.FxzeroError as error:
        return type(error).__name__
    return "none"


def disagrees(rank: int, world_size: int) -> str:
    """Rank 1 alone is given a cluster."""
    zero = fxzero.compile(make_model(), cluster=SLOW if rank == 1 else None)
    try:
        zero(make_batch(0, rank))
    except fxzero.FxzeroError as error:
        return f"{type(error).__name__} {error}"
    return "none"
