"""Peak resident memory of a rank during steps."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
import torch.distributed as dist

import fxzero
from benchmarks.against.scenarios import shape_of
from benchmarks.against.workers.cluster import CLUSTER
from benchmarks.against.workers.work import Numbers, Work
from benchmarks.network.model import Encoder, init_weights, make_batch
from benchmarks.network.systems import adamw
from benchmarks.resident import reset_peak, resident_mib


def prepare(place: argparse.Namespace, options: Mapping[str, int]) -> Work:
    """As `benchmarks.peak_memory`; the mark is reset after the warm-up."""
    shape = shape_of(options)
    with torch.device("meta"):
        model = Encoder(shape)
    optimizer = adamw(model.parameters())
    example = make_batch(shape, 0, place.rank)
    zero = fxzero.compile(model, optimizer=optimizer, example=example, init_fn=init_weights, cluster=CLUSTER)

    def steps(first: int, count: int) -> None:
        for step in range(first, first + count):
            zero(*make_batch(shape, step, place.rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.barrier()

    steps(0, options["warmup"])
    reset_peak()

    def turn() -> Numbers:
        steps(options["warmup"], options["steps"])
        return {"peak resident, MiB": resident_mib("VmHWM")[0]}

    return Work(turn)
