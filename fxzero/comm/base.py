"""Collectives, bound once to their persistent buffers, so that a generated step calls functions without arguments.

    bound = comm.bind_gather(payload, shard, full)       # at compile time
    bound.start(); ...; bound.wait()                     # in every step; a part that has nothing to do is None

Buffers are flat: `full` [payload.numel] has a slice [payload.slice_numel] of each rank, in rank order; `shard` is one
such slice. Starts come in one order, the same on all ranks. A shard must not change before `drain()`, which ends each
phase.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from fxzero.comm.backend import Backend, NativeBackend
from fxzero.comm.phases import PhaseLog
from fxzero.graph.layout import Payload
from fxzero.graph.sharding import Sharding

Stage: TypeAlias = tuple[Callable[[], object], Callable[[], object]]
"""The start and the wait of a collective, or of a part of one, that has both."""


class Bound(NamedTuple):
    """A collective and its buffers. None: there is nothing to do."""

    start: Callable[[], object] | None
    wait: Callable[[], object] | None

    @property
    def stage(self) -> Stage:
        """Both parts of a collective over several ranks, which always has something to do."""
        assert self.start is not None and self.wait is not None
        return self.start, self.wait

    def then(self, *work: Callable[[], object] | None) -> Bound:
        """The same, whose wait is followed by work, if there is some."""
        return Bound(self.start, in_turn(self.wait, *work)) if any(work) else self


def in_turn(*functions: Callable[[], object] | None) -> Callable[[], object]:
    """One function that calls those functions that are not None, in order."""
    calls = [function for function in functions if function is not None]
    if len(calls) == 1:
        return calls[0]

    def all_of_them() -> None:
        for call in calls:
            call()

    return all_of_them


class Comm(ABC):
    """What the ranks of a job exchange. All operations but the bound ones block (on CUDA: the stream)."""

    backend: Backend
    """The memory and the work that its collectives need."""
    is_capturable = False
    """True if its bound collectives can be in a CUDA graph."""

    def __init__(self, rank: int, sharding: Sharding) -> None:
        self.phases = PhaseLog()
        """The phases that the ranks go through together."""
        self.rank = rank
        """The number of this rank's shard."""
        self.sharding = sharding
        self.shard_ranks = sharding.shard_ranks
        self.divisor: float = sharding.world_size
        """By which sums of gradients over all ranks are divided."""

    @property
    def is_alone(self) -> bool:
        """True if there is nobody to talk to."""
        return self.sharding.is_alone

    @property
    def is_rank0(self) -> bool:
        """True on the rank whose values count."""
        return self.rank == 0

    @property
    def gathers_in_place(self) -> bool:
        """True if the shard already is the whole bucket, so that gathers need no memory."""
        return self.shard_ranks == 1

    def reduce_scratch_numel(self, payload: Payload, *, accumulate: bool = True) -> int:
        """Elements of scratch that a reduce-scatter needs between its start and its wait; 0 if none."""
        return self.backend.reduce_scratch_numel(payload, self.sharding, accumulate=accumulate)

    def scratch_for(self, payload: Payload, scratch: Tensor | None, *, accumulate: bool) -> Tensor | None:
        """The part of some memory that a reduce-scatter works in, `[reduce_scratch_numel]`; None if it needs none.

        Raises:
            ValueError: there is too little.
        """
        needed = self.reduce_scratch_numel(payload, accumulate=accumulate)
        if needed and (scratch is None or scratch.numel() < needed):
            raise ValueError(f"scratch must have at least {needed} elements to reduce {payload.fqns[0]}")
        return scratch[:needed] if needed and scratch is not None else None

    @abstractmethod
    def bind_gather(self, payload: Payload, shard: Tensor, full: Tensor) -> Bound:
        """Gather `shard` [slice_numel] of every rank into `full` [numel]. On one rank both are the same memory.

        If `shard` is this rank's slice of `full`, which need not persist, it is sent by the end of the wait.
        """

    def bind_gather_keeping(self, payload: Payload, shard: Tensor, full: Tensor, secondary: Tensor) -> Bound:
        """Gather, and leave this rank's slice of what travels inside its node in `secondary`, which persists.

        Only where nodes share the shards.

        Args:
            secondary: `[num_nodes * slice_numel]`. If `shard` is this rank's part of it, that is sent by the end of the
                wait.
        """
        raise NotImplementedError(f"{type(self).__name__} gathers in one stage")

    def bind_gather_inside(self, payload: Payload, secondary: Tensor, full: Tensor) -> Bound:
        """Gather from the secondary shards of this node alone, which `bind_gather_keeping` left."""
        raise NotImplementedError(f"{type(self).__name__} gathers in one stage")

    @abstractmethod
    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        """Sum `full` [numel] over the ranks and divide by `divisor`; this rank's slice goes to `shard` [slice_numel].

        Args:
            full: the unsharded gradients; their contents are undefined after the wait.
            scratch: at least `reduce_scratch_numel(payload, accumulate=accumulate)` elements; None if that is 0.
            accumulate: add the quotient to `shard` at the wait; else overwrite it, from the start on.
        """

    def bind_exchange(self, payload: Payload, sent: Tensor, received: Sequence[Tensor]) -> Bound:
        """Send the r-th slice of `sent` [numel] to rank r and receive from it `received[r]` [slice_numel].

        The rank's own entry of `received` is left alone. Only where the backend sums locally.
        """
        raise NotImplementedError(f"{type(self).__name__} reduces by its backend")

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Reduce a small tensor over the ranks, in place. No host synchronisation on CUDA."""

    @abstractmethod
    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        """Fill `shard` [slice_numel] with this rank's slice of the `full` [numel] of rank 0 (None elsewhere)."""

    @abstractmethod
    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        """Overwrite a tensor of any shape, dtype and strides with that of rank 0."""

    @abstractmethod
    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        """Gather `shard` [slice_numel] of every rank into `full` [numel]."""

    @abstractmethod
    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        """Gather `shard` [slice_numel] of every rank into the `full` [numel] of rank 0 (None elsewhere)."""

    def all_to_all(self, what: str, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Send `sent[r]` to rank r and receive from it `received[r]`: bytes, uint8, where both agree on the sizes.

        The rank's own entries are left alone.

        Args:
            what: the name of the exchange in error texts.
        """
        raise NotImplementedError(f"{type(self).__name__} exchanges slices of one size alone")

    def meet(self) -> None:
        """Return once all ranks have come to this phase, where the backend can tell phases apart.

        Collectives outside of a step follow it: a backend would take any two that meet for the same one.
        """
        return

    def drain(self) -> None:
        """End a phase: everything this rank has to send is out, so its shards may change."""
        return

    def abandon(self) -> None:
        """End a phase in the middle, after an error: take in what peers have sent, so that none takes it for the next.

        Peers that failed in the same place can then go on together.
        """
        return


class LocalComm(Comm):
    """One rank: the shard is the whole bucket.

    Args:
        divisor: by which gradients are divided. Default: 1.
    """

    backend = NativeBackend()
    is_capturable = True

    def __init__(self, divisor: float | None = None) -> None:
        super().__init__(0, Sharding())
        self.divisor = 1 if divisor is None else divisor

    def bind_gather(self, payload: Payload, shard: Tensor, full: Tensor) -> Bound:
        return Bound(None, _copy(full, shard))

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        divide = partial(full.div_, self.divisor) if self.divisor != 1 else None
        return Bound(None, divide).then(partial(shard.add_, full) if accumulate else _copy(shard, full))

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        pass

    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        assert full is not None
        shard.copy_(full)

    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        pass

    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        full.copy_(shard)

    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        assert full is not None
        full.copy_(shard)


def _copy(into: Tensor, source: Tensor) -> Callable[[], object] | None:
    """The copy between two buffers; None if they are the same memory."""
    return None if into.data_ptr() == source.data_ptr() else partial(into.copy_, source)
