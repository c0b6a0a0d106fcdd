"""Bind a schedule to CUDA streams: which events the generated code records, and what each start waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxzero.graph.nodes import Role, is_gather, is_inside, role, wait_of, wire_format
from fxzero.graph.step import StepGraph
from fxzero.memory.arena_plan import Placed
from fxzero.planning.stream_events import (
    BEGIN,
    CudaStreams,
    plan_events,
    queues_of,
    readers_of,
    requirements,
    works_at_wait,
)


def occupied_before(step: StepGraph, placed: Placed, *, accumulate: bool) -> dict[fx.Node, list[fx.Node]]:
    """For each start, the compute nodes that used the bytes which its collective overwrites.

    A gather writes its bucket and a reduce-scatter its scratch, on the communication stream; compute reads gathered
    parameters, and reads scratch at the wait of a reduce-scatter that accumulates or travels in another type. A staged
    gather writes its staging buffer, from which compute copies at its wait; the bucket, and the staging buffer of a
    reduce-scatter, are written by compute, which has waited for all collectives that used their bytes. So is the rank's
    own row in the staging buffer of what travels in another type, unless it comes from secondary shards: the start
    waits for that, and so for all before it.
    """
    at = step.positions()
    before: dict[fx.Node, list[fx.Node]] = {}
    for (kind, start), (buffer, offset) in placed.items():
        if not _written_by_start(step, kind, start):
            continue
        for (other_kind, other), (earlier, other_offset) in placed.items():
            apart = offset + buffer.nbytes <= other_offset or other_offset + earlier.nbytes <= offset
            if earlier.end >= buffer.start or apart:
                continue
            if other_kind == "gather":
                before.setdefault(start, []).extend(readers_of(other))
            is_read_at_wait = is_gather(other) or other_kind in ("scratch", "partial")
            if is_read_at_wait and works_at_wait(step, other, accumulate=accumulate):
                wait = wait_of(other)
                if at[wait] <= earlier.end:  # else only its start used them, for whose work later starts wait too
                    before.setdefault(start, []).append(wait)
    return before


def _written_by_start(step: StepGraph, kind: str, start: fx.Node) -> bool:
    """False for memory that only compute writes."""
    if kind == "staging":
        return is_gather(start) and (wire_format(start) is None or is_inside(start))
    return kind not in ("gradient", "quantize") and not (kind == "gather" and step.is_staged(start))


@dataclass(frozen=True)
class Events:
    """The events of one binding of a plan."""

    streams: CudaStreams
    recorded: dict[fx.Node, Callable[[], object]]
    """What to call after a node."""
    begin: Callable[[], object] | None
    """What to call before everything else."""
    positions: Mapping[fx.Node, int]

    def start(
        self, node: fx.Node, start: Callable[[], object], copies: Callable[[], object] | None = None
    ) -> Callable[[], object]:
        """The start of a collective, after the events of its inputs and on the communication stream.

        Args:
            copies: what makes its input just before, on the compute stream.
        """
        return self.streams.start(self.positions[node], start, copies)


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
