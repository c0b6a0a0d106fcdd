"""Host work of a step of tiny layers, of the thread that trains."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import fxzero
from benchmarks.against.scenarios import shape_of
from benchmarks.against.workers.cluster import CLUSTER
from benchmarks.against.workers.work import Numbers, Work
from benchmarks.network.model import Encoder, make_batch
from benchmarks.network.rank import Rank
from benchmarks.network.systems import Job, Training, adamw


def prepare(place: argparse.Namespace, options: Mapping[str, int]) -> Work:
    """The first step of a turn is not counted. Calls are those of one step, as cProfile counts them."""
    fxzero.keep_freed_memory()
    job = Job(place.rank, place.world_size, shape_of(options))
    rank = Rank(_clipped(job), job, place.interface, {})
    rank.steps(options["warmup"])

    def turn() -> Numbers:
        return {"step, processor s": statistics.median(step["main_cpu_s"] for step in rank.steps(options["k"])[1:])}

    def exact() -> Numbers:
        counts = zip(*(rank.calls() for _ in range(3)), strict=True)
        names = "Python calls of forward and backward", "Python calls of clipping and the optimizer"
        return dict(zip(names, map(statistics.median, counts), strict=True))

    return Work(turn, exact)


def _clipped(job: Job) -> Training:
    model = Encoder(job.shape)
    optimizer = adamw(model.parameters())
    example = make_batch(job.shape, 0, job.rank)
    zero: Any = fxzero.compile(model, optimizer=optimizer, example=example, cluster=CLUSTER)

    def update() -> None:
        zero.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Training(zero, lambda loss: loss.backward(), update)
