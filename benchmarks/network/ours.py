"""fxzero as a system: as users get it, with a naive schedule, and with its collectives stubbed out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxzero
from benchmarks.network.model import make_batch
from benchmarks.network.systems import Job, Training, adamw, plain
from fxzero.comm.base import Bound
from fxzero.comm.gloo import GlooComm
from fxzero.cost.model import GBIT
from fxzero.testing import engine_of

RATES = (8.0, 4.0, 2.0, 1.0, 0.5)
"""Gbit/s for which steps are predicted."""
PAYLOAD = 0.94
"""Of a link's rate, what TCP leaves to gloo's messages: 0.93 to 0.95 of the bare loop at 2 and 1 Gbit/s."""


def train(model: nn.Module, job: Job, **options: Any) -> Training:
    """`fxzero.compile` with the options given."""
    optimizer = adamw(model.parameters())
    zero = fxzero.compile(model, optimizer=optimizer, example=make_batch(job.shape, 0, job.rank), **options)
    return plain(zero, optimizer, facts=lambda: facts(zero))


def naive(model: nn.Module, job: Job) -> Training:
    """Everything turned off that fxzero does against the network."""
    return train(model, job, without="all")


def stubbed(model: nn.Module, job: Job, **options: Any) -> Training:
    """The code that fxzero generates, where starts and waits of collectives do nothing.

    Values are wrong, but of ordinary size: the arena is filled anew before every step, off the clock.
    """
    optimizer = adamw(model.parameters())
    zero = fxzero.compile(model, optimizer=optimizer, **options)
    engine = engine_of(zero)
    engine.comm = SilentComm(engine.comm.group)
    training = plain(zero, optimizer)
    noise = torch.empty(0)

    def fill() -> None:
        nonlocal noise
        memory = engine.arena.view(0, engine.arena.nbytes // 4, torch.float32)
        if noise.numel() != memory.numel():
            noise = torch.randn(memory.numel(), generator=torch.Generator().manual_seed(0)) * 0.02
        memory.copy_(noise)

    training.prepare = fill
    return training


class SilentComm(GlooComm):
    """Exchanges what is exchanged outside of steps, and nothing in them."""

    def bind_gather(self, *_: Any, **__: Any) -> Bound:
        return Bound(None, None)

    def bind_reduce(self, *_: Any, **__: Any) -> Bound:
        return Bound(None, None)


def facts(zero: Any) -> dict[str, Any]:
    """What the plan says of a step: its bytes, and how long it would take at each rate of the link, all else equal."""
    totals, timing = zero.schedule.totals, zero.schedule.timing if engine_of(zero).tuner.cluster else None
    return {
        "predicted": {
            f"{rate:g}": timing.at_rate(PAYLOAD * rate * GBIT).predicted_step_s for rate in RATES if timing is not None
        },
        "cluster": str(engine_of(zero).tuner.cluster),
        "planned_bytes": totals.gathered_bytes + totals.reduced_bytes,
        "collectives": totals.num_all_gathers + totals.num_reduce_scatters,
    }
