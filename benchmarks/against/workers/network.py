"""Seconds of a step over a link, of a system of `benchmarks.network`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import fxzero
from benchmarks.against.scenarios import shape_of
from benchmarks.against.workers.work import Numbers, Work
from benchmarks.network.model import Encoder
from benchmarks.network.rank import Rank
from benchmarks.network.systems import SYSTEMS, Job


def prepare(place: argparse.Namespace, options: Mapping[str, Any]) -> Work:
    """The first step of a turn is not counted."""
    fxzero.keep_freed_memory()
    job = Job(place.rank, place.world_size, shape_of(options))
    rank = Rank(SYSTEMS[options["system"]].make(Encoder(job.shape), job), job, place.interface, {})
    rank.steps(options["warmup"])

    def turn() -> Numbers:
        return {"step, s": statistics.median(step["seconds"] for step in rank.steps(options["k"])[1:])}

    return Work(turn)
