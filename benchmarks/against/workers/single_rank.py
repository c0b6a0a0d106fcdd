"""Seconds of a step at world size 1."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping

import torch

import fxzero
from benchmarks.against.scenarios import shape_of
from benchmarks.against.workers.models import batch_of, roberta
from benchmarks.against.workers.work import Numbers, Work
from benchmarks.network.systems import adamw
from benchmarks.single_rank import make_step


def prepare(_place: argparse.Namespace, options: Mapping[str, int]) -> Work:
    """As `benchmarks.single_rank`; the first step of a turn is not counted."""
    fxzero.keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = shape_of(options)
    model, batch = roberta(shape), batch_of(shape)
    optimizer = adamw(model.parameters())
    step = make_step(fxzero.compile(model, optimizer=optimizer, example=batch), optimizer, batch)
    for _ in range(options["warmup"]):
        step()

    def turn() -> Numbers:
        return {"step, s": statistics.median([step() for _ in range(options["k"])][1:])}

    return Work(turn)
