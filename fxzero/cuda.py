"""Bind a schedule to CUDA streams: which events the generated code records, and what each start waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxzero.ir import Role, StepGraph, is_gather, role, wait_of
from fxzero.memory import Buffer
from fxzero.streams import BEGIN, CudaStreams, plan_events, queues_of, readers_of, requirements

Placed = Mapping[tuple[str, fx.Node], tuple[Buffer, int]]
"""Each buffer of an arena and its offset in bytes, by kind and the start of its collective."""


def occupied_before(step: StepGraph, placed: Placed, *, accumulate: bool) -> dict[fx.Node, list[fx.Node]]:
    """For each start, the compute nodes that used the bytes which its collective overwrites.

    A gather writes its bucket and a reduce-scatter its scratch, on the communication stream; compute reads gathered
    parameters, and adds from scratch at the wait of an accumulating reduce-scatter.
    """
    before: dict[fx.Node, list[fx.Node]] = {}
    for (kind, start), (buffer, offset) in placed.items():
        if kind == "gradient":
            continue
        for (other_kind, other), (earlier, other_offset) in placed.items():
            apart = offset + buffer.nbytes <= other_offset or other_offset + earlier.nbytes <= offset
            if earlier.end >= buffer.start or apart:
                continue
            if other_kind == "gather":
                before.setdefault(start, []).extend(readers_of(other))
            elif other_kind in ("scratch", "partial") and accumulate:
                before.setdefault(start, []).append(wait_of(other))
    return before


@dataclass(frozen=True)
class Events:
    """The events of one binding of a plan."""

    streams: CudaStreams
    recorded: dict[fx.Node, Callable[[], object]]
    """What to call after a node."""
    begin: Callable[[], object] | None
    """What to call before everything else."""
    positions: Mapping[fx.Node, int]

    def start(self, node: fx.Node, start: Callable[[], object]) -> Callable[[], object]:
        """The start of a collective, after the events of its inputs and on the communication stream."""
        return self.streams.start(self.positions[node], start)


def plan_cuda_events(step: StepGraph, placed: Placed, cuda: Any, device: Any, *, accumulate: bool) -> Events:
    """Find the events that a step on two streams needs.

    Args:
        cuda: `torch.cuda`, or what looks like it.
        accumulate: reduce-scatters add to the gradient shards at their waits.
    """
    queues = queues_of(step, accumulate=accumulate)
    occupied = occupied_before(step, placed, accumulate=accumulate)
    streams = CudaStreams(
        queues, plan_events(queues, requirements(step, occupied, accumulate=accumulate)), cuda, device
    )
    at = step.positions()
    recorded: dict[fx.Node, Callable[[], object]] = {}
    for node in step.graph.nodes:
        for record in streams.after(at[node]):
            assert role(node) is not Role.ALL_GATHER or not is_gather(node)
            recorded[node] = record
    return Events(streams, recorded, next(iter(streams.after(BEGIN)), None), at)
