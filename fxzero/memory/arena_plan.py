"""Where everything lies in the arena that a step needs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from fxzero.comm.backend import Backend
from fxzero.comm.wire_copies import reduce_scratch_nbytes
from fxzero.graph.layout import ALIGNMENT_BYTES, align
from fxzero.graph.nodes import Role, members, wire_format
from fxzero.graph.step import StepGraph
from fxzero.memory.activations import Activations
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

Place: TypeAlias = "tuple[str, fx.Node]"
"""A buffer's kind, and the start of its collective or the node that writes it."""
Placed: TypeAlias = "Mapping[Place, tuple[Buffer, int]]"
"""Each buffer of an arena and its offset in bytes."""


@dataclass(frozen=True)
class ArenaPlan:
    """The offsets of one variant of a step."""

    memory: MemoryPlan
    placed: Placed

    @property
    def nbytes(self) -> int:
        """Bytes of the arena that it needs."""
        return self.memory.peak_bytes


def plan_arenas(
    step: StepGraph, backend: Backend, activations: Activations, enough_bytes: int = 0
) -> dict[bool, ArenaPlan]:
    """Place the communication memory of a step, and those temporaries that have a place.

    If forward keeps buckets, all that lies in the arena lies at the same place in both variants, so that whichever
    backward follows finds them; what only one needs that adds to gradients is placed around it.

    Args:
        enough_bytes: of an arena that is there in any case: below them no better offsets are searched for.

    Returns:
        The plan for a backward that overwrites gradients (False), and for one that adds to them (True); a step without
        reductions has the first alone.
    """
    residents = _residents(step)
    own = MemoryPlan(tuple(buffer for _, buffer, _ in residents), tuple(at for _, _, at in residents))
    begin = align(own.peak_bytes, ALIGNMENT_BYTES)

    def packed(buffers: dict[Place, Buffer]) -> ArenaPlan:
        rest = _pack(list(buffers.values()), enough_bytes - begin)
        offsets = [*own.offsets, *(begin + offset for offset in rest.offsets)]
        return _proved([*(place for place, _, _ in residents), *buffers], [*own.buffers, *rest.buffers], offsets)

    common = _buffers(step, backend, activations)
    plans = {False: packed(common)}
    if step.nodes(Role.REDUCE_SCATTER):
        adding = _only_adding(step, backend)
        plans[True] = _around(plans[False], adding) if step.kept else packed(common | adding)
    return plans


def _residents(step: StepGraph) -> list[tuple[Place | None, Buffer, int]]:
    """The buckets with a place of their own, each with its offset; None for one that the step does not gather."""
    if step.sharding.shard_ranks == 1:  # the shards are the buckets
        return []
    gathers = {members(start): start for start in step.nodes(Role.ALL_GATHER)}
    return [
        (("gather", gathers[fqns]) if fqns in gathers else None, buffer, offset)
        for fqns, (buffer, offset) in resident_buffers(step).items()
    ]


def _pack(buffers: list[Buffer], enough_bytes: int) -> MemoryPlan:
    """Offsets with a low peak; those that are found at once if their peak is low enough."""
    if enough_bytes > 0:
        plan = plan_memory(buffers, effort=0)
        if plan.peak_bytes <= enough_bytes:
            return plan
    return plan_memory(buffers, effort=EFFORT)


def _around(arena: ArenaPlan, adding: dict[Place, Buffer]) -> ArenaPlan:
    """The offsets of an arena, and around them what a backward needs to add to gradients."""
    plan = arena.memory
    places = {id(buffer): place for place, (buffer, _) in arena.placed.items()}
    stays = [i for i, buffer in enumerate(plan.buffers) if places.get(id(buffer)) not in adding]
    base = MemoryPlan(tuple(plan.buffers[i] for i in stays), tuple(plan.offsets[i] for i in stays))
    whole = plan_around(base, list(adding.values()))
    return _proved([*(places.get(id(b)) for b in base.buffers), *adding], list(whole.buffers), list(whole.offsets))


def _proved(places: list[Place | None], buffers: list[Buffer], offsets: list[int]) -> ArenaPlan:
    """An arena in which no two live buffers share bytes.

    Args:
        places: None for a resident bucket that the step does not gather.

    Raises:
        MemoryOverlapError: some do.
    """
    plan = MemoryPlan(tuple(buffers), tuple(offsets))
    plan.verify()
    entries = zip(places, zip(buffers, offsets, strict=True), strict=True)
    return ArenaPlan(plan, {place: entry for place, entry in entries if place is not None})


def _buffers(step: StepGraph, backend: Backend, activations: Activations) -> dict[Place, Buffer]:
    """What every variant of a step needs in the arena."""
    buffers: dict[Place, Buffer] = {}
    if step.sharding.shard_ranks > 1:  # else the shards are the buckets
        buffers |= _placed("gather", gather_buffers(step))
    if not step.sharding.is_alone:  # else gradients are computed in their shard
        buffers |= _placed("gradient", gradient_buffers(step))
    buffers |= {("temporary", node): placed.buffer for node, placed in activations.placed.items()}
    buffers |= _placed("staging", staging_buffers(step)) | _placed("quantize", quantize_buffers(step))
    buffers |= _scratch(step, backend, accumulate=False)
    some = [start for start in step.nodes(Role.REDUCE_SCATTER) if is_partial(step, start)]
    nbytes = {start: step.bucket_of(start).shard_nbytes for start in some}
    return buffers | _placed("partial", working_buffers(step, "partial", nbytes))


def _only_adding(step: StepGraph, backend: Backend) -> dict[Place, Buffer]:
    """What a backward needs to add to gradients, in place of or beside what every one needs."""
    adding = _scratch(step, backend, accumulate=True)
    if step.sharding.is_alone:  # else gradients are computed in the arena in any case
        adding |= _placed("gradient", gradient_buffers(step))
    return adding


def _scratch(step: StepGraph, backend: Backend, *, accumulate: bool) -> dict[Place, Buffer]:
    """What reductions work in."""
    starts = step.nodes(Role.REDUCE_SCATTER)
    nbytes = {start: scratch_nbytes(step, backend, start, accumulate=accumulate) for start in starts}
    return _placed("scratch", working_buffers(step, "scratch", nbytes))


def _placed(kind: str, buffers: Mapping[fx.Node, Buffer]) -> dict[Place, Buffer]:
    return {(kind, start): buffer for start, buffer in buffers.items()}


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
