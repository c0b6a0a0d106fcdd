"""Where everything lies in the arena that one variant of a step needs there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxzero.comm.backend import Backend
from fxzero.comm.wire_copies import reduce_scratch_nbytes
from fxzero.graph.layout import ALIGNMENT_BYTES, align
from fxzero.graph.nodes import Role, members, wire_format
from fxzero.graph.step import StepGraph
from fxzero.graph.variant import Variant
from fxzero.memory.activations import placed_temporaries
from fxzero.memory.lifetimes import (
    Buffer,
    MemoryPlan,
    gather_buffers,
    gradient_buffers,
    plan_around,
    plan_memory,
    quantize_buffers,
    resident_buffers,
    staging_buffers,
    working_buffers,
)

EFFORT = 5
"""Of the search for the arena's offsets: a fraction of a second where the lower bound is out of reach."""


def plan_arena(step: StepGraph, backend: Backend, variant: Variant) -> tuple[MemoryPlan, Placed]:
    """Place the communication memory of one variant of a step, and those temporaries that have a place.

    If forward keeps buckets, what all variants need lies at the same place in all of them, so that whichever backward
    follows finds them; what only an accumulating backward needs is placed around it.

    Returns:
        The plan, and each buffer and its offset in bytes, by kind and the start of its collective, or the node.
    """
    common: dict[tuple[str, fx.Node], Buffer] = {}  # what all variants need
    extra: dict[tuple[str, fx.Node], Buffer] = {}
    gradients = {("gradient", start): buffer for start, buffer in gradient_buffers(step).items()}
    gathers_in_place = step.sharding.shard_ranks == 1  # the shards are the buckets
    if not gathers_in_place:
        common |= {("gather", start): buffer for start, buffer in gather_buffers(step).items()}
    if not step.sharding.is_alone:
        common |= gradients
    elif variant.accumulate:  # else they are computed in their shard
        extra |= gradients
    common |= {("temporary", node): placed.buffer for node, placed in placed_temporaries(step).items()}
    common |= {("staging", start): buffer for start, buffer in staging_buffers(step).items()}
    common |= {("quantize", start): buffer for start, buffer in quantize_buffers(step).items()}
    reduces = {start: step.bucket_of(start) for start in step.nodes(Role.REDUCE_SCATTER)}
    for needed, accumulate in ((common, False), (extra, True)):
        if variant.accumulate or not accumulate:
            nbytes = {start: scratch_nbytes(step, backend, start, accumulate=accumulate) for start in reduces}
            needed |= {("scratch", start): buffer for start, buffer in working_buffers(step, "scratch", nbytes).items()}
    some = {start: bucket.shard_nbytes for start, bucket in reduces.items() if is_partial(step, start)}
    common |= {("partial", start): buffer for start, buffer in working_buffers(step, "partial", some).items()}
    resident = {} if gathers_in_place else resident_buffers(step)
    if not step.kept:
        common, extra = common | extra, {}
    own = MemoryPlan(tuple(buffer for buffer, _ in resident.values()), tuple(at for _, at in resident.values()))
    rest, begin = plan_memory(list(common.values()), effort=EFFORT), align(own.peak_bytes, ALIGNMENT_BYTES)
    offsets = (*own.offsets, *(begin + offset for offset in rest.offsets))
    plan = plan_around(MemoryPlan((*own.buffers, *rest.buffers), offsets), list(extra.values()))
    plan.verify()
    placed = list(zip(plan.buffers, plan.offsets, strict=True))
    gathers = {members(start): start for start in step.nodes(Role.ALL_GATHER)}
    homes = {("gather", gathers[fqns]): placed[i] for i, fqns in enumerate(resident) if fqns in gathers}
    return plan, homes | dict(zip([*common, *extra], placed[len(resident) :], strict=True))


def scratch_nbytes(step: StepGraph, backend: Backend, start: fx.Node, *, accumulate: bool) -> int:
    """Bytes that a reduce-scatter works in."""
    format = wire_format(start)
    if format is not None:
        return reduce_scratch_nbytes(backend, step.sharding, step.bucket_of(start), format, accumulate=accumulate)
    payload = step.payload_of(start)
    numel = backend.reduce_scratch_numel(payload, step.sharding, accumulate=accumulate)
    return numel * payload.dtype.itemsize


def is_partial(step: StepGraph, start: fx.Node) -> bool:
    """True for a reduce_scatter of some members of the bucket of its gather."""
    return members(start) != step.bucket_of(start).fqns


Placed = Mapping[tuple[str, fx.Node], tuple[Buffer, int]]
"""Each buffer of an arena and its offset in bytes, by kind and the start of its collective."""
