"""fxzero with its collectives stubbed out: what its generated code computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxzero
from benchmarks.network.systems import Job, Training, adamw, mixed_precision, plain
from fxzero.comm.base import Bound
from fxzero.comm.gloo import GlooComm
from fxzero.testing import engine_of


def stubbed(model: nn.Module, job: Job, *, mixed: bool = False, **options: Any) -> Training:
    """The code that fxzero generates, where starts and waits of collectives do nothing.

    Values are wrong, but of ordinary size: the arena is filled anew before every step, off the clock.
    """
    optimizer = adamw(model.parameters())
    if mixed:
        options["mp_policy"] = mixed_precision(mixed=True)
    zero = fxzero.compile(model, optimizer=optimizer, **options)
    sharded = engine_of(zero).sharded
    assert isinstance(sharded.comm, GlooComm)
    sharded.comm = SilentComm(sharded.comm.group)
    training = plain(zero, optimizer)
    noise = torch.empty(0)

    def fill() -> None:
        nonlocal noise
        memory = sharded.arena.view(0, sharded.arena.nbytes // 4, torch.float32)
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
