"""Where everything lies in the arena that a step needs there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from fxzero.comm.backend import Backend
from fxzero.comm.wire_copies import bucket_scratch_nbytes, casts
from fxzero.graph.layout import ALIGNMENT_BYTES, align
from fxzero.graph.liveness import live_until
from fxzero.graph.names import bucket_label
from fxzero.graph.nodes import Role, first_write, is_inside, members, operands, wait_of, wire_format
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import SCALE_DTYPE
from fxzero.memory.activations import Activations
from fxzero.memory.lifetimes import Buffer, Kind, MemoryPlan, plan_around, plan_memory

EFFORT = 5
"""Limit of the search for the arena's offsets: a fraction of a second where the lower bound is out of reach."""

Place: TypeAlias = "tuple[Kind, fx.Node]"
"""A buffer's kind, and the start of its collective or the node that writes it."""
Placed: TypeAlias = "Mapping[Place, tuple[Buffer, int]]"
"""Each buffer of an arena and its offset in bytes."""
_Entry: TypeAlias = "tuple[Place | None, Buffer, int]"
"""A buffer and its offset; the place is None for a resident bucket that the step does not gather."""


@dataclass(frozen=True)
class ArenaPlan:
    """The offsets of one variant of a step."""

    memory: MemoryPlan
    placed: Placed

    @property
    def nbytes(self) -> int:
        """Bytes of the arena that the variant needs."""
        return self.memory.peak_bytes


def plan_arenas(
    step: StepGraph, backend: Backend, activations: Activations, enough_bytes: int = 0
) -> dict[bool, ArenaPlan]:
    """Place the communication memory of a step, and those temporaries that have a place.

    If forward keeps buckets, whichever backward follows must find them. So the variant that adds to gradients places
    every buffer where the other variant has it, and around them what it alone needs.

    Args:
        enough_bytes: size of an arena that is there in any case: no offsets with a lower peak are searched for.

    Returns:
        The plan for a backward that overwrites gradients (False), and for one that adds to them (True); a step without
        reductions has the first alone.

    Raises:
        MemoryOverlapError: two live buffers share bytes.
    """
    residents = _residents(step)
    begin = max((align(at + buffer.nbytes, ALIGNMENT_BYTES) for _, buffer, at in residents), default=0)

    def packed(buffers: dict[Place, Buffer]) -> list[_Entry]:
        offsets = _pack(list(buffers.values()), enough_bytes - begin).offsets
        rest = zip(buffers.items(), offsets, strict=True)
        return [*residents, *((place, buffer, begin + offset) for (place, buffer), offset in rest)]

    overwriting = packed(arena_buffers(step, backend, activations, accumulate=False))
    plans = {False: _proved(overwriting)}
    if step.nodes(Role.REDUCE_SCATTER):
        buffers = arena_buffers(step, backend, activations, accumulate=True)
        plans[True] = _proved(_around(overwriting, buffers) if step.kept else packed(buffers))
    return plans


def _residents(step: StepGraph) -> list[_Entry]:
    """The buckets that stay gathered until the shards change, at offsets that are equal in every plan."""
    if step.sharding.shard_ranks == 1:  # the shards are the buckets
        return []
    gathers = {members(start): start for start in step.nodes(Role.ALL_GATHER)}
    last, end = len(step.graph.nodes) - 1, 0
    entries: list[_Entry] = []
    for fqns in step.resident:
        buffer = Buffer(Kind.GATHER, bucket_label(fqns), step.bucket(fqns).gathered.nbytes, 0, last)
        entries.append(((Kind.GATHER, gathers[fqns]) if fqns in gathers else None, buffer, end))
        end += align(buffer.nbytes, ALIGNMENT_BYTES)
    return entries


def _pack(buffers: list[Buffer], enough_bytes: int) -> MemoryPlan:
    """Offsets with a low peak; those that are found at once if their peak is low enough."""
    if enough_bytes > 0:
        plan = plan_memory(buffers, effort=0)
        if plan.peak_bytes <= enough_bytes:
            return plan
    return plan_memory(buffers, effort=EFFORT)


def _around(entries: list[_Entry], buffers: dict[Place, Buffer]) -> list[_Entry]:
    """An arena with other buffers: scratch and what is new is placed around those that stay where they are."""
    there = {place for place, _, _ in entries}
    adding = {place: each for place, each in buffers.items() if place[0] is Kind.SCRATCH or place not in there}
    stays = [entry for entry in entries if entry[0] not in adding]
    offsets = plan_around(_memory(stays), list(adding.values())).offsets[len(stays) :]
    return [*stays, *((place, buffer, at) for (place, buffer), at in zip(adding.items(), offsets, strict=True))]


def _memory(entries: Sequence[_Entry]) -> MemoryPlan:
    return MemoryPlan(tuple(buffer for _, buffer, _ in entries), tuple(offset for _, _, offset in entries))


def _proved(entries: list[_Entry]) -> ArenaPlan:
    """An arena in which no two live buffers share bytes."""
    memory = _memory(entries)
    memory.verify()
    return ArenaPlan(memory, {place: (buffer, offset) for place, buffer, offset in entries if place is not None})


def arena_buffers(
    step: StepGraph, backend: Backend, activations: Activations, *, accumulate: bool
) -> dict[Place, Buffer]:
    """The buffers that one variant of a step needs in the arena, without resident buckets."""
    at = step.positions()
    buffers: dict[Place, Buffer] = {}
    for start in step.nodes(Role.ALL_GATHER):
        buffers |= {(buffer.kind, start): buffer for buffer in _of_gather(step, start, at)}
    for start in step.nodes(Role.REDUCE_SCATTER):
        of_reduction = _of_reduction(step, backend, start, at, accumulate=accumulate)
        buffers |= {(buffer.kind, start): buffer for buffer in of_reduction}
    return buffers | {(Kind.TEMPORARY, node): placed.buffer for node, placed in activations.placed.items()}


def _of_gather(step: StepGraph, start: fx.Node, at: Mapping[fx.Node, int]) -> Iterator[Buffer]:
    """The buffers of an all_gather."""
    payload, format, is_staged = step.payload_of(start), wire_format(start), step.is_staged(start)
    label, begin, wait = bucket_label(payload.fqns), at[start], at[wait_of(start)]
    if step.sharding.shard_ranks > 1 and payload.fqns not in step.resident:  # on one rank the shards are the buckets
        yield Buffer(Kind.GATHER, label, payload.nbytes, wait if is_staged else begin, at[live_until(step, start)])
    if is_staged:
        yield Buffer(Kind.STAGING, label, step.travels(start).nbytes, begin, wait)
    if format is not None and format.block_numel is not None:
        is_dequantized_there = payload.dtype is not SCALE_DTYPE
        if is_dequantized_there or not is_inside(start):  # secondary shards are quantised already
            nbytes = payload.slice_numel * SCALE_DTYPE.itemsize
            yield Buffer(Kind.QUANTIZE, label, nbytes, begin, wait if is_dequantized_there else begin)


def _of_reduction(
    step: StepGraph, backend: Backend, start: fx.Node, at: dict[fx.Node, int], *, accumulate: bool
) -> Iterator[Buffer]:
    """The buffers of a reduce_scatter."""
    payload, is_staged = step.payload_of(start), step.is_staged(start)
    label, begin, wait = bucket_label(payload.fqns), at[start], at[wait_of(start)]
    is_cast = casts(step.bucket_of(start), wire_format(start))
    if accumulate or is_cast or not step.sharding.is_alone:  # else gradients are computed in their shard
        first = min(at[first_write(slot)] for slot in operands(start))
        yield Buffer(Kind.GRADIENT, label, payload.nbytes, first, begin if is_staged else wait)
    if is_staged:
        yield Buffer(Kind.STAGING, label, step.travels(start).nbytes, begin, wait)
    if nbytes := scratch_nbytes(step, backend, start, accumulate=accumulate):
        yield Buffer(Kind.SCRATCH, label, nbytes, begin, wait)
    if is_partial(step, start):
        yield Buffer(Kind.PARTIAL, label, step.bucket_of(start).shard_nbytes, begin, wait)


def scratch_nbytes(step: StepGraph, backend: Backend, start: fx.Node, *, accumulate: bool) -> int:
    """Bytes of scratch that a reduce-scatter needs."""
    format = wire_format(start)
    return bucket_scratch_nbytes(backend, step.sharding, step.bucket_of(start), format, accumulate=accumulate)


def is_partial(step: StepGraph, start: fx.Node) -> bool:
    """True for a reduce_scatter of some members of the bucket of its gather."""
    return members(start) != step.bucket_of(start).fqns
