"""A buffer's memory from the allocator, for each use of it, in the place of the planned arena.

    start: take | all_gather | wait | ... | last reader | release: give back

The reference to measure persistent buffers against. Every view of a buffer is bound once, as ever, to a storage of its
own; taking resizes that from nothing to the buffer's bytes, which come at another address each time. Buffers live as in
the plan of the arena, so that what is in use at any time is the same. Parameter and gradient shards stay persistent.

Source: FSDP1 frees and allocates the storage of its flat parameter in this way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import fx

from fxzero.comm.base import in_turn
from fxzero.graph.layout import ALIGNMENT_BYTES, align
from fxzero.graph.nodes import Role, role, started_by
from fxzero.memory.arena_plan import Place, Placed
from fxzero.memory.lifetimes import Buffer
from fxzero.runtime.binding import Binder
from fxzero.runtime.storage import Arena, storage_view

Call = Callable[[], object]


class TransientMemory(Arena):
    """Looks like an arena, but has a storage for each buffer. All variants of a plan share it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._storages: dict[Place, torch.UntypedStorage] = {}
        self._at: dict[int, torch.UntypedStorage] = {}
        self._end = 0
        self._opened: list[torch.UntypedStorage] = []

    def reserve(self, nbytes: int) -> bool:
        return False

    def spread(self, placed: Placed) -> Placed:
        """Offsets at which no two buffers overlap, by which `view` knows them."""
        spread: dict[Place, tuple[Buffer, int]] = {}
        for key, (buffer, _) in placed.items():
            if key not in self._storages:
                self._storages[key] = torch.empty(0, dtype=torch.uint8, device=self.device).untyped_storage()
            self._at[self._end] = self._storages[key]
            spread[key] = buffer, self._end
            self._end += align(max(buffer.nbytes, 1), ALIGNMENT_BYTES)
        return spread

    def view(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A view of a whole buffer. Its storage has the size that views are made with until `close`."""
        storage = self._at[offset]
        if storage.nbytes() < numel * dtype.itemsize:
            self._opened.append(storage)
            storage.resize_(numel * dtype.itemsize)
        return storage_view(storage, 0, numel, dtype, self.device)

    def close(self) -> None:
        """Give back what `view` took."""
        for storage in self._opened:
            storage.resize_(0)
        self._opened.clear()

    def take(self, offset: int, nbytes: int) -> Call:
        """What allocates a buffer; one that is there keeps its contents."""
        return partial(self._at[offset].resize_, nbytes)

    def give_back(self, offset: int) -> Call:
        """What frees a buffer."""
        return partial(self._at[offset].resize_, 0)


class _Life(NamedTuple):
    """A buffer of a collective, from node to node."""

    start: fx.Node
    begin: fx.Node
    end: fx.Node
    take: Call
    give_back: Call


@dataclass
class TransientBinder(Binder):
    """Binds one plan for one variant of its backward to memory that is there while it is used."""

    @classmethod
    def memory_for(cls, arena: Arena, nbytes: int) -> Arena:
        return TransientMemory(arena.device)

    def __post_init__(self) -> None:
        super().__post_init__()
        memory = self.arena
        assert isinstance(memory, TransientMemory)
        self._memory = memory
        self.placed = memory.spread(self.placed)
        nodes = list(self.step.graph.nodes)
        self._lives = [
            _Life(start, nodes[buffer.start], nodes[buffer.end], memory.take(at, buffer.nbytes), memory.give_back(at))
            for (_, start), (buffer, at) in self.placed.items()
        ]

    def recorded(self) -> dict[fx.Node, Call]:
        calls = super().recorded()
        for life in self._lives:
            if role(life.begin) is Role.GRAD_SLOT:  # no statement of its own
                calls[life.begin] = in_turn(life.take, calls.get(life.begin))
            if role(life.end) is Role.RELEASE:
                calls[life.end] = in_turn(calls.get(life.end), life.give_back)
        return calls

    def finish(self) -> None:
        """Take each buffer before its first use and give it back after its last.

        At a start both are done on the compute stream, before the collective, which waits for an event of that. A
        bucket that stays gathered until the shards change is not given back.
        """
        names, copies = self.names, self.copies
        for life in self._lives:
            begin = role(life.begin)
            if begin is Role.WAIT:
                wait = f"wait_{started_by(life.begin).name}"
                names[wait] = in_turn(life.take, names[wait])
            elif begin is Role.WRITE_GRAD:
                names[life.begin.name] = _taking(life.take, names[life.begin.name])
            elif begin is not Role.GRAD_SLOT:
                copies[life.start] = in_turn(life.take, copies.get(life.start))
        for life in self._lives:
            if role(life.end) is Role.WAIT:
                wait = f"wait_{started_by(life.end).name}"
                names[wait] = in_turn(names[wait], life.give_back)
            elif role(life.end) in (Role.ALL_GATHER, Role.REDUCE_SCATTER):
                copies[life.end] = in_turn(copies.get(life.end), life.give_back)
        self._memory.close()


def _taking(take: Call, write: Callable[..., object]) -> Callable[..., object]:
    """What writes the first gradient of a bucket."""

    def taking(*gradient: torch.Tensor) -> None:
        take()
        write(*gradient)

    return taking
