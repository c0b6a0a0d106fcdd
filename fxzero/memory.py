"""Lifetimes to offsets: where each gathered bucket and gradient bucket lies in the arena, planned once.

A buffer lives from `start` to `end`, both included; two that live at the same time never share a byte:

    position:   0    1    2    3    4    5
    gather 0    [=========]
    gather 1         [=========]
    gradient 1                 [=========]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import fx

from fxzero.errors import MemoryOverlapError
from fxzero.ir import Role, StepGraph, first_write, operands, wait_of
from fxzero.layout import ALIGNMENT_BYTES, align
from fxzero.schedule import live_until
from fxzero.text import bucket_label, format_bytes

Kind: TypeAlias = Literal["gather", "gradient", "scratch", "partial", "staging", "saved", "temporary"]


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

    def verify(self) -> None:
        """Check that no two live buffers share bytes.

        Raises:
            MemoryOverlapError: names both.
        """
        placed = list(zip(self.offsets, self.buffers, strict=True))
        for index, (offset, buffer) in enumerate(placed):
            for other_offset, other in placed[:index]:
                apart = offset + buffer.nbytes <= other_offset or other_offset + other.nbytes <= offset
                if buffer.overlaps(other) and not apart:
                    raise MemoryOverlapError(
                        f"{buffer.kind} {buffer.name} at {offset} and {other.kind} {other.name} at {other_offset} are "
                        f"live together and share bytes ({format_bytes(buffer.nbytes)}, {format_bytes(other.nbytes)})."
                    )


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


def plan_around(plan: MemoryPlan, buffers: Sequence[Buffer]) -> MemoryPlan:
    """Place more buffers into the holes of a plan, and behind it, the largest first; what is placed stays."""
    everything = (*plan.buffers, *buffers)
    order = sorted(
        range(len(plan.buffers), len(everything)), key=lambda i: (-everything[i].nbytes, everything[i].start)
    )
    return MemoryPlan(everything, _place(everything, order, plan.offsets))


def plan_memory(buffers: Sequence[Buffer]) -> MemoryPlan:
    """Place every buffer at the lowest aligned offset that is free during its life, in the best of a few orders.

    Deterministic: the orders are tried in turn until one meets the lower bound; ties go to the earlier one. In the
    order of starts, buffers of one size always meet it.
    """
    indices = range(len(buffers))
    orders = (
        sorted(indices, key=lambda i: (-buffers[i].nbytes, buffers[i].start)),
        sorted(indices, key=lambda i: (buffers[i].start, -buffers[i].nbytes)),
        sorted(indices, key=lambda i: (buffers[i].start - buffers[i].end, -buffers[i].nbytes)),
    )
    best: MemoryPlan | None = None
    for order in orders:
        plan = MemoryPlan(tuple(buffers), _place(buffers, order))
        if best is None or plan.peak_bytes < best.peak_bytes:
            best = plan
        if best.peak_bytes == best.lower_bound_bytes:
            break
    assert best is not None
    return best


def _place(buffers: Sequence[Buffer], order: Sequence[int], fixed: Sequence[int] = ()) -> tuple[int, ...]:
    """First fit: the lowest free offset for each buffer in turn; the first ones may have theirs already."""
    offsets = [*fixed, *[0] * (len(buffers) - len(fixed))]
    placed = list(range(len(fixed)))
    for index in order:
        taken = sorted((offsets[j], buffers[j].nbytes) for j in placed if buffers[index].overlaps(buffers[j]))
        offset = 0
        for begin, nbytes in taken:
            if offset + buffers[index].nbytes <= begin:
                break
            offset = max(offset, align(begin + nbytes, ALIGNMENT_BYTES))
        offsets[index] = offset
        placed.append(index)
    return tuple(offsets)


def gather_buffers(step: StepGraph) -> dict[fx.Node, Buffer]:
    """The gathered bucket of each all_gather, from its start to its release; interleaved: from its wait.

    Not of those that have a place of their own.
    """
    at = step.positions()
    return {
        start: Buffer("gather", bucket_label(bucket.fqns), bucket.nbytes, at[begin], at[live_until(step, start)])
        for start in step.nodes(Role.ALL_GATHER)
        for bucket in [step.bucket_of(start)]
        if bucket.fqns not in step.resident
        for begin in [wait_of(start) if bucket.interleaved else start]
    }


def resident_buffers(step: StepGraph) -> dict[tuple[str, ...], tuple[Buffer, int]]:
    """The buckets that stay gathered until the shards change, and their offsets: the same in every plan."""
    last = len(step.graph.nodes) - 1
    placed: dict[tuple[str, ...], tuple[Buffer, int]] = {}
    end = 0
    for fqns in step.resident:
        nbytes = step.bucket(fqns).nbytes
        placed[fqns] = Buffer("gather", bucket_label(fqns), nbytes, 0, last), end
        end += align(nbytes, ALIGNMENT_BYTES)
    return placed


def gradient_buffers(step: StepGraph) -> dict[fx.Node, Buffer]:
    """The gradient bucket of each reduce_scatter, from its first write to its wait; interleaved: to its start."""
    at = step.positions()
    return {
        start: Buffer(
            "gradient",
            bucket_label(bucket.fqns),
            bucket.nbytes,
            min(at[first_write(slot)] for slot in operands(start)),
            at[start if bucket.interleaved else wait_of(start)],
        )
        for start in step.nodes(Role.REDUCE_SCATTER)
        for bucket in [step.bucket_of(start)]
    }


def staging_buffers(step: StepGraph) -> dict[fx.Node, Buffer]:
    """What travels in an interleaved layout, of each collective, from its start to its wait."""
    at = step.positions()
    return {
        start: Buffer("staging", bucket_label(bucket.fqns), bucket.nbytes, at[start], at[wait_of(start)])
        for start in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER)
        for bucket in [step.bucket_of(start)]
        if bucket.interleaved
    }


def working_buffers(step: StepGraph, kind: Kind, nbytes: dict[fx.Node, int]) -> dict[fx.Node, Buffer]:
    """What reduce_scatters work in, from start to wait; `nbytes` by start, 0 where none is needed."""
    at = step.positions()
    return {
        start: Buffer(kind, bucket_label(step.bucket_of(start).fqns), size, at[start], at[wait_of(start)])
        for start, size in nbytes.items()
        if size
    }


class Arena:
    """One persistent block of bytes that all plans share. It grows in place: views of it stay valid."""

    def __init__(self, device: torch.device) -> None:
        self._storage = torch.empty(0, dtype=torch.uint8, device=device).untyped_storage()
        self._device = device
        self.generation = 0
        """Counts the phases that ran: what one of them left is there only until the next."""

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes()

    def reserve(self, nbytes: int) -> bool:
        """Make the arena at least `nbytes` long; only while no bucket is in flight. True if it grew."""
        if nbytes <= self.nbytes:
            return False
        self._storage.resize_(nbytes)
        return True

    def view(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """`numel` elements at byte `offset`, as a flat tensor."""
        return storage_view(self._storage, offset, numel, dtype, self._device)


def storage_view(
    storage: torch.UntypedStorage, offset: int, numel: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`numel` elements of `dtype` at byte `offset` of a storage, as a flat tensor that shares it."""
    return torch.empty(0, dtype=dtype, device=device).set_(storage, offset // dtype.itemsize, (numel,), (1,))
