"""Processor seconds until a model can take steps, and of a schedule for ranks that are not there."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fxzero
from benchmarks.against.scenarios import WITH_FIRST_STEPS
from benchmarks.against.workers.cluster import CLUSTER
from benchmarks.against.workers.models import batch_of, gpt, roberta
from benchmarks.against.workers.work import Numbers, Work
from benchmarks.host_overhead import SHAPE as TINY_LAYERS
from benchmarks.network.systems import Shape
from fxzero.planner import plan

FAMILIES: Mapping[str, Callable[[Shape], nn.Module]] = {"roberta": roberta, "gpt": gpt}
WORLD_SIZE = 8


def prepare(_place: argparse.Namespace, options: Mapping[str, int]) -> Work:
    """A turn takes each family once, with a new model each time.

    What is compiled here has tiny layers, as steps are taken with it, and weights are not what is measured; what is
    planned for ranks that are not there has ordinary ones, of which buckets are to be chosen.
    """
    torch.set_num_threads(1)
    tiny, ordinary = (replace(shape, layers=options["layers"]) for shape in (TINY_LAYERS, Shape()))

    def turn() -> Numbers:
        found: Numbers = {}
        for family, make in FAMILIES.items():
            compiled_s, first_s = _compile(make(tiny), batch_of(tiny))
            found[f"{family}: compile, processor s"] = compiled_s
            found[f"{family}: {WITH_FIRST_STEPS}"] = compiled_s + first_s
            found[f"{family}: plan for {WORLD_SIZE} ranks, processor s"] = _plan(make, ordinary)
        return found

    turn()
    return Work(turn)


def _compile(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Processor seconds of compile, and what the first steps of each kind take more than later ones."""
    compiled_s, zero = _timed(lambda: fxzero.compile(model, example=batch))

    def micro_steps() -> None:
        zero(**batch).loss.backward()
        zero(**batch).loss.backward()  # adds to gradients
        with zero.no_sync():
            zero(**batch).loss.backward()

    first_s, _ = _timed(micro_steps)
    zero.zero_grad()
    steady_s, _ = _timed(micro_steps)
    return compiled_s, first_s - steady_s


def _plan(make: Callable[[Shape], nn.Module], shape: Shape) -> float:
    with torch.device("meta"):
        model = make(shape)
    return _timed(lambda: plan(model, batch_of(shape), world_size=WORLD_SIZE, cluster=CLUSTER))[0]


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call that finds no garbage, and what it returned."""
    gc.collect()
    begin = time.process_time()
    returned = call()
    return time.process_time() - begin, returned
