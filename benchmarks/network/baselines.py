"""What a lower bound is made of: compute without communication, and communication without compute."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.network.systems import Job, Training, adamw

MESSAGE_BYTES, NUM_MESSAGES = 6 << 20, 15
"""Of the bare loop: messages of the size of a bucket, together about what one gather of the default model sends."""


def compute(model: nn.Module, job: Job) -> Training:
    """Eager compute of a ZeRO-3 rank that exchanges nothing: the optimizer steps 1/world_size of every parameter."""
    params = list(model.parameters())
    shards = [nn.Parameter(p.detach().view(-1)[: -(-p.numel() // job.world_size)]) for p in params]
    optimizer = adamw(shards)

    def update() -> None:
        for param, shard in zip(params, shards, strict=True):
            assert param.grad is not None
            shard.grad = param.grad.view(-1)[: shard.numel()]
        optimizer.step()
        optimizer.zero_grad()
        for param in params:
            param.grad = None

    return Training(model, lambda loss: loss.backward(), update)


def wire(model: nn.Module, job: Job) -> Training:
    """Messages to the next rank and from the one before, at the same time, as plain gloo moves them.

    Every receive is posted before the first send, as "ready to receive" would else queue up behind the data.
    """
    group: Any = dist.group.WORLD
    after, before = (job.rank + 1) % job.world_size, (job.rank - 1) % job.world_size
    outgoing = list(torch.ones(NUM_MESSAGES, MESSAGE_BYTES, dtype=torch.uint8))
    incoming = list(torch.ones(NUM_MESSAGES, MESSAGE_BYTES, dtype=torch.uint8))
    zero = torch.zeros(())

    def exchange(_ids: Tensor, _labels: Tensor) -> Tensor:
        works = [group.recv([into], before, tag) for tag, into in enumerate(incoming)]
        works += [group.send([message], after, tag) for tag, message in enumerate(outgoing)]
        for work in works:
            work.wait()
        return zero

    return Training(exchange, facts=partial(dict, sent_bytes=MESSAGE_BYTES * NUM_MESSAGES))
