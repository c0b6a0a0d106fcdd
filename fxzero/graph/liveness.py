"""From which node to which the memory of a collective's bucket is taken."""

from __future__ import annotations

import itertools

from torch import fx

from fxzero.graph.nodes import Role, first_write, is_gather, members, operands, release_of, wait_of
from fxzero.graph.step import StepGraph


def live_from(step: StepGraph, start: fx.Node, positions: dict[fx.Node, int]) -> fx.Node:
    """The node from which on the memory of a collective's bucket is taken; gradients are written before their start."""
    if is_gather(start):
        return start
    return min((first_write(slot) for slot in operands(start)), key=lambda node: positions[node])


def live_until(step: StepGraph, start: fx.Node) -> fx.Node:
    """The node at which the memory of a collective's bucket is free again."""
    wait = wait_of(start)
    if not is_gather(start):
        return wait
    if release := release_of(wait):
        return release
    return step.output if members(start) in {*step.kept, *step.resident} else end_of_phase(step, start)


def end_of_phase(step: StepGraph, node: fx.Node) -> fx.Node:
    """The boundary or the output, whichever ends the phase of `node`."""
    boundary = step.end_forward
    if boundary is not None and node < boundary:
        return boundary
    return step.output


def bucket_bytes_live(step: StepGraph, *roles: Role) -> dict[fx.Node, int]:
    """Bytes of gathered buckets (ALL_GATHER) and gradient buckets (REDUCE_SCATTER) that are live after each node.

    What is staged counts with the bytes that travel, from start to wait. A rank that is alone gathers nothing: its
    shards are the buckets.
    """
    positions = step.positions()
    change = dict.fromkeys(positions, 0)
    for start in step.nodes(*roles):
        if step.sharding.is_alone or (is_gather(start) and step.sharding.shard_ranks == 1):
            continue
        begin, end = live_from(step, start, positions), live_until(step, start)
        nbytes = step.payload_of(start).nbytes
        change[begin] += nbytes
        change[end] -= nbytes
        saved = nbytes - step.travels(start).nbytes
        change[start] -= saved
        change[wait_of(start)] += saved
    return dict(zip(change, itertools.accumulate(change.values()), strict=True))
