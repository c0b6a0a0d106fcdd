"""Lifetimes to offsets: where each gathered bucket and gradient bucket lies in the arena, planned once.

A buffer lives from `start` to `end`, both included; two that live at the same time never share a byte:

    position:   0    1    2    3    4    5
    gather 0    [=========]
    gather 1         [=========]
    gradient 1                 [=========]
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

from fxzero.errors import MemoryOverlapError
from fxzero.graph.layout import ALIGNMENT_BYTES, align
from fxzero.graph.names import format_bytes
from fxzero.memory.packing import EFFORT, pack


class Writer(enum.Enum):
    """Who writes a buffer first; on a GPU each of the two has a stream of its own."""

    COMPUTE = "compute"
    COLLECTIVE = "collective"


class Kind(enum.Enum):
    """The purposes of buffers. The value is the name that texts print."""

    GATHER = "gather"
    """Gathered parameters of a bucket."""
    GRADIENT = "gradient"
    """Gradients of a bucket before they are reduced."""
    SCRATCH = "scratch"
    """Working memory of a reduce-scatter."""
    PARTIAL = "partial"
    """The reduced shard of a whole bucket, where a reduce-scatter keeps some of its members only."""
    STAGING = "staging"
    """What travels, where its layout or its type is not that of the bucket."""
    QUANTIZE = "quantize"
    """The float32 values of a shard while it is quantised or dequantised."""
    SAVED = "saved"
    """An activation that forward saves for backward."""
    TEMPORARY = "temporary"
    """Any other activation."""

    @property
    def written_by(self) -> Writer:
        """The first writer of such a buffer. Staging that compute fills is an exception (`stream_events.py`)."""
        by_collectives = (Kind.GATHER, Kind.SCRATCH, Kind.PARTIAL, Kind.STAGING)
        return Writer.COLLECTIVE if self in by_collectives else Writer.COMPUTE

    @property
    def read_at_wait(self) -> bool:
        """True if compute reads such a buffer of a reduce-scatter at its wait."""
        return self in (Kind.SCRATCH, Kind.PARTIAL)


@dataclass(frozen=True)
class Buffer:
    """Bytes that are live from position `start` to position `end` of a step, both included."""

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
        return peak_of(self.buffers)

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
            begin, buffer = entry = self.offsets[index], self.buffers[index]
            place = bisect_left(live, begin, key=itemgetter(0))
            if not starts:
                del live[place]
                continue
            for offset, other in live[max(place - 1, 0) : place + 1]:
                if offset < begin + buffer.nbytes and begin < offset + other.nbytes:
                    raise MemoryOverlapError(_describe(entry, (offset, other)))
            live.insert(place, entry)


def _describe(first: tuple[int, Buffer], second: tuple[int, Buffer]) -> str:
    names = [f"{buffer.kind.value} {buffer.name} at {offset}" for offset, buffer in (first, second)]
    sizes = ", ".join(format_bytes(buffer.nbytes) for _, buffer in (first, second))
    return f"{names[0]} and {names[1]} are live together and share bytes ({sizes})."


def live_at(buffers: Iterable[Buffer], num_positions: int) -> list[int]:
    """The sum of live bytes at each position of a step that has `num_positions`."""
    change = [0] * (num_positions + 1)
    for buffer in buffers:
        change[buffer.start] += buffer.nbytes
        change[buffer.end + 1] -= buffer.nbytes
    return list(accumulate(change[:num_positions]))


def peak_of(buffers: Sequence[Buffer]) -> int:
    """The largest sum of live bytes at any position."""
    return max(live_at(buffers, max((buffer.end for buffer in buffers), default=0) + 1))


def plan_memory(buffers: Sequence[Buffer], *, effort: int = EFFORT) -> MemoryPlan:
    """Place every buffer, with the lowest peak that is found; deterministic.

    Args:
        effort: limit of the search where simple placement misses the lower bound; 0 searches nothing (`packing.pack`).
    """
    lives = [[b.nbytes for b in buffers], [b.start for b in buffers], [b.end for b in buffers]]
    return MemoryPlan(tuple(buffers), tuple(pack(*lives, alignment=ALIGNMENT_BYTES, effort=effort)))


def plan_around(plan: MemoryPlan, buffers: Sequence[Buffer]) -> MemoryPlan:
    """Place more buffers into the holes of a plan, and behind it, the largest first; what is placed stays."""
    placed, offsets = list(zip(plan.buffers, plan.offsets, strict=True)), [0] * len(buffers)
    for index in sorted(range(len(buffers)), key=lambda i: (-buffers[i].nbytes, buffers[i].start)):
        buffer, offset = buffers[index], 0
        for begin, nbytes in sorted((at, other.nbytes) for other, at in placed if buffer.overlaps(other)):
            if offset + buffer.nbytes <= begin:
                break
            offset = max(offset, align(begin + nbytes, ALIGNMENT_BYTES))
        offsets[index] = offset
        placed.append((buffer, offset))
    return MemoryPlan((*plan.buffers, *buffers), (*plan.offsets, *offsets))
