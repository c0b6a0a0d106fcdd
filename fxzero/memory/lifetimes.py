"""Lifetimes to offsets: where each gathered bucket and gradient bucket lies in the arena, planned once.

A buffer lives from `start` to `end`, both included; two that live at the same time never share a byte:

    position:   0    1    2    3    4    5
    gather 0    [=========]
    gather 1         [=========]
    gradient 1                 [=========]
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import fx

from fxzero.errors import MemoryOverlapError
from fxzero.graph.layout import ALIGNMENT_BYTES, align
from fxzero.graph.liveness import live_until
from fxzero.graph.names import bucket_label, format_bytes
from fxzero.graph.nodes import Role, first_write, is_inside, operands, wait_of, wire_format
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import SCALE_DTYPE
from fxzero.memory.packing import EFFORT, pack

Kind: TypeAlias = Literal["gather", "gradient", "scratch", "partial", "staging", "quantize", "saved", "temporary"]


@dataclass(frozen=True)
class Buffer:
    """Bytes that must lie somewhere in the arena from position `start` to position `end`, both included."""

    kind: Kind
    name: str
    nbytes: int
    start: int
    end: int

    def overlaps(self, other: Buffer) -> bool:
        """True if both are live at some position."""
        return self.start <= other.end and other.start <= self.end


@dataclass(frozen=True)
class MemoryPlan:
    """An offset in bytes for each buffer."""

    buffers: tuple[Buffer, ...]
    offsets: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        """Bytes of the arena that the plan needs."""
        return max((offset + b.nbytes for offset, b in zip(self.offsets, self.buffers, strict=True)), default=0)

    @property
    def lower_bound_bytes(self) -> int:
        """Largest sum of live bytes at any position: no plan can need less."""
        return max(live_bytes(self.buffers), default=0)

    @property
    def ratio(self) -> float:
        """Peak over lower bound: 1.0 is optimal."""
        return self.peak_bytes / self.lower_bound_bytes if self.lower_bound_bytes else 1.0

    def verify(self) -> None:
        """Check that no two live buffers share bytes.

        Raises:
            MemoryOverlapError: names both.
        """
        live: list[tuple[int, Buffer]] = []  # by offset
        taking = [(index, buffer) for index, buffer in enumerate(self.buffers) if buffer.nbytes]
        events = [(buffer.start, 1, index) for index, buffer in taking]
        events += [(buffer.end + 1, 0, index) for index, buffer in taking]
        for _, starts, index in sorted(events):
            entry = (self.offsets[index], self.buffers[index])
            place = bisect_left(live, _order(entry), key=_order)
            if not starts:
                del live[place]
                continue
            for offset, other in live[max(place - 1, 0) : place + 1]:
                if offset < entry[0] + entry[1].nbytes and entry[0] < offset + other.nbytes:
                    raise MemoryOverlapError(_describe(entry, (offset, other)))
            live.insert(place, entry)


def _order(placed: tuple[int, Buffer]) -> tuple[int, int, str, str]:
    offset, buffer = placed
    return offset, buffer.nbytes, buffer.kind, buffer.name


def _describe(first: tuple[int, Buffer], second: tuple[int, Buffer]) -> str:
    names = [f"{buffer.kind} {buffer.name} at {offset}" for offset, buffer in (first, second)]
    sizes = ", ".join(format_bytes(buffer.nbytes) for _, buffer in (first, second))
    return f"{names[0]} and {names[1]} are live together and share bytes ({sizes})."


def live_bytes(buffers: Sequence[Buffer]) -> list[int]:
    """The sum of live bytes at each position at which some buffer starts, in order of position."""
    events: dict[int, int] = {}
    for buffer in buffers:
        events[buffer.start] = events.get(buffer.start, 0) + buffer.nbytes
        events[buffer.end + 1] = events.get(buffer.end + 1, 0) - buffer.nbytes
    live, sums = 0, list[int]()
    for position in sorted(events):
        live += events[position]
        sums.append(live)
    return sums


def plan_memory(
    buffers: Sequence[Buffer], *, alignment_bytes: int = ALIGNMENT_BYTES, effort: int = EFFORT
) -> MemoryPlan:
    """Place every buffer, with the lowest peak that is found; deterministic.

    Args:
        alignment_bytes: of which every offset is a multiple.
        effort: of the search where simple placement misses the lower bound; 0 searches nothing (see `packing.pack`).
    """
    sizes, starts, ends = zip(*((b.nbytes, b.start, b.end) for b in buffers), strict=True) if buffers else ((), (), ())
    return MemoryPlan(tuple(buffers), tuple(pack(sizes, starts, ends, alignment=alignment_bytes, effort=effort)))


def plan_around(plan: MemoryPlan, buffers: Sequence[Buffer]) -> MemoryPlan:
    """Place more buffers into the holes of a plan, and behind it, the largest first; what is placed stays."""
    everything, offsets = [*plan.buffers], [*plan.offsets]
    places = dict[int, int]()
    for index in sorted(range(len(buffers)), key=lambda i: (-buffers[i].nbytes, buffers[i].start)):
        buffer, offset = buffers[index], 0
        placed = zip(offsets, everything, strict=True)
        for begin, nbytes in sorted((at, other.nbytes) for at, other in placed if buffer.overlaps(other)):
            if offset + buffer.nbytes <= begin:
                break
            offset = max(offset, align(begin + nbytes, ALIGNMENT_BYTES))
        places[index] = offset
        everything.append(buffer)
        offsets.append(offset)
    return MemoryPlan((*plan.buffers, *buffers), (*plan.offsets, *(places[index] for index in range(len(buffers)))))


def gather_buffers(step: StepGraph) -> dict[fx.Node, Buffer]:
    """The gathered bucket of each all_gather, from its start to its release; staged: from its wait.

    Not of those that have a place of their own.
    """
    at = step.positions()
    return {
        start: Buffer("gather", bucket_label(payload.fqns), payload.nbytes, at[begin], at[live_until(step, start)])
        for start in step.nodes(Role.ALL_GATHER)
        for payload in [step.payload_of(start)]
        if payload.fqns not in step.resident
        for begin in [wait_of(start) if step.is_staged(start) else start]
    }


def resident_buffers(step: StepGraph) -> dict[tuple[str, ...], tuple[Buffer, int]]:
    """The buckets that stay gathered until the shards change, and their offsets: the same in every plan."""
    last = len(step.graph.nodes) - 1
    placed: dict[tuple[str, ...], tuple[Buffer, int]] = {}
    end = 0
    for fqns in step.resident:
        nbytes = step.bucket(fqns).gathered.nbytes
        placed[fqns] = Buffer("gather", bucket_label(fqns), nbytes, 0, last), end
        end += align(nbytes, ALIGNMENT_BYTES)
    return placed


def gradient_buffers(step: StepGraph) -> dict[fx.Node, Buffer]:
    """The gradient bucket of each reduce_scatter, from its first write to its wait; staged: to its start."""
    at = step.positions()
    return {
        start: Buffer(
            "gradient",
            bucket_label(payload.fqns),
            payload.nbytes,
            min(at[first_write(slot)] for slot in operands(start)),
            at[start if step.is_staged(start) else wait_of(start)],
        )
        for start in step.nodes(Role.REDUCE_SCATTER)
        for payload in [step.payload_of(start)]
    }


def staging_buffers(step: StepGraph) -> dict[fx.Node, Buffer]:
    """What travels, where that is of another layout or type than the bucket, from start to wait."""
    at = step.positions()
    return {
        start: Buffer("staging", bucket_label(travels.fqns), travels.nbytes, at[start], at[wait_of(start)])
        for start in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER)
        for travels in [step.travels(start)]
        if step.is_staged(start)
    }


def quantize_buffers(step: StepGraph) -> dict[fx.Node, Buffer]:
    """The float32 shard in which a gather is quantised at its start and, if its bucket is of another dtype, dequantised
    at its wait."""
    at = step.positions()
    return {
        start: Buffer(
            "quantize",
            bucket_label(payload.fqns),
            payload.slice_numel * SCALE_DTYPE.itemsize,
            at[start],
            at[start if payload.dtype is SCALE_DTYPE else wait_of(start)],
        )
        for start in step.nodes(Role.ALL_GATHER)
        for payload in [step.payload_of(start)]
        if (format := wire_format(start)) is not None and format.block_numel is not None
        if payload.dtype is not SCALE_DTYPE or not is_inside(start)  # what comes from secondary shards is quantised
    }


def working_buffers(step: StepGraph, kind: Kind, nbytes: dict[fx.Node, int]) -> dict[fx.Node, Buffer]:
    """What reduce_scatters work in, from start to wait; `nbytes` by start, 0 where none is needed."""
    at = step.positions()
    return {
        start: Buffer(kind, bucket_label(step.bucket_of(start).fqns), size, at[start], at[wait_of(start)])
        for start, size in nbytes.items()
        if size
    }
