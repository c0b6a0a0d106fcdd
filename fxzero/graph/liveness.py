"""The nodes between which the memory of a collective's bucket is in use."""

import itertools

from torch import fx

from fxzero.graph.nodes import Role, first_write, is_gather, members, operands, release_of, wait_of
from fxzero.graph.step import StepGraph


def live_until(step: StepGraph, start: fx.Node) -> fx.Node:
    """The node after which the memory of a collective's bucket is free again."""
    wait = wait_of(start)
    if not is_gather(start):
        return wait
    if release := release_of(wait):
        return release
    boundary = step.end_forward
    if boundary is None or boundary < start or members(start) in {*step.kept, *step.resident}:
        return step.output
    return boundary


def bucket_bytes_live(step: StepGraph, *roles: Role) -> dict[fx.Node, int]:
    """Bytes of gathered buckets (ALL_GATHER) and gradient buckets (REDUCE_SCATTER) that are live after each node.

    From start to wait, a bucket counts with the bytes that travel. On one rank nothing is gathered: the shards are the
    buckets.
    """
    change = dict.fromkeys(step.graph.nodes, 0)
    for start in step.nodes(*roles):
        if step.sharding.is_alone or (is_gather(start) and step.sharding.shard_ranks == 1):
            continue
        begin = start if is_gather(start) else min(first_write(slot) for slot in operands(start))
        nbytes = step.payload_of(start).nbytes
        change[begin] += nbytes
        change[live_until(step, start)] -= nbytes
        saved = nbytes - step.travels(start).nbytes
        change[start] -= saved
        change[wait_of(start)] += saved
    return dict(zip(change, itertools.accumulate(change.values()), strict=True))
