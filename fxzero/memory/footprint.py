"""What a step needs of a rank's memory, in bytes, by kind and position: held, in the arena, and in activations.

held          parameter, gradient and optimizer shards, buffers: there from step to step
arena         one planned block, there from step to step: gathered and gradient buckets, what reductions work in, and
              large temporary activations on the CPU
activations   what else operators make, saved for backward or temporary: the allocator's, known ahead of time
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from fxzero.comm.backend import Backend
from fxzero.graph.devices import Devices
from fxzero.graph.layout import Layout, Payload
from fxzero.graph.step import StepGraph
from fxzero.memory.activations import Activations, activations_of
from fxzero.memory.arena_plan import plan_arenas
from fxzero.memory.lifetimes import Buffer, Kind, MemoryPlan, live_at, peak_of


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds from step to step, beside the arena."""

    parameters: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    buffers: int = 0
    unsharded_gradients: int = 0
    """Under no_sync(), or with `accumulate=`."""
    secondaries: int = 0
    """Secondary shards of parameters, where nodes share the primary ones."""
    copies: int = 0
    """Copies of parameter shards in the dtype that compute reads, where that is another."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Footprint:
    """The memory of one plan."""

    held: Held
    arena: MemoryPlan
    activations: tuple[Buffer, ...]
    num_positions: int
    arena_bytes: int
    """Bytes of the arena, which all plans of a model share: at least what this one needs."""

    @property
    def activation_peak_bytes(self) -> int:
        """Largest sum of activations that have no place in the arena."""
        return peak_of(self.activations)

    @property
    def planned_peak_bytes(self) -> int:
        """What a rank needs: all that is held, the arena, and the activations at their peak."""
        return self.held.total + self.arena_bytes + self.activation_peak_bytes

    @property
    def lower_bound_bytes(self) -> int:
        """Largest sum of live bytes at any position: no placement of anything can need less."""
        return self.held.total + peak_of((*self.arena.buffers, *self.activations))

    def live(self, *kinds: Kind) -> list[int]:
        """Live bytes of some kinds of buffers at each position."""
        return live_at([b for b in (*self.arena.buffers, *self.activations) if b.kind in kinds], self.num_positions)

    @property
    def peak_position(self) -> int:
        """The first position at which the most bytes are live."""
        live = self.live(*Kind)
        return live.index(max(live))


def footprint(step: StepGraph, arena: MemoryPlan, activations: Activations, held: Held, arena_bytes: int) -> Footprint:
    """The memory of one variant of a complete plan.

    Args:
        arena: its offsets in the arena.
        arena_bytes: of the whole arena, which other variants and plans use too.
    """
    return Footprint(held, arena, activations.of_allocator, len(step.graph.nodes), max(arena.peak_bytes, arena_bytes))


def footprint_of(step: StepGraph, backend: Backend, held: Held) -> Footprint:
    """The memory of a complete plan that is a trial: that of a backward which adds to gradients, if there is one."""
    activations = activations_of(step)
    arenas = plan_arenas(step, backend, activations)
    arena = arenas.get(True, arenas[False])
    return footprint(step, arena.memory, activations, held, arena.nbytes)


def held_by(
    layout: Layout,
    devices: Devices,
    *,
    state_per_element: float,
    buffers: int,
    unsharded: bool = False,
    secondaries: Iterable[Payload] = (),
) -> Held:
    """What a rank holds of a model on the device that computes.

    Args:
        state_per_element: elements of optimizer state for each element of a trained parameter (AdamW: 2).
        buffers: bytes of the module's buffers.
        unsharded: True if it holds whole gradients, as `StepGraph.needs_unsharded` says.
        secondaries: what it has secondary shards of, as `StepGraph.secondaries` has them.
    """
    trained = [bucket for bucket in layout.buckets if bucket.requires_grad]
    gradients = sum(bucket.shard_nbytes for bucket in trained)
    has_state_here = devices.optimizer == devices.compute
    return Held(
        parameters=layout.shard_nbytes,
        gradients=gradients,
        optimizer_state=round(gradients * state_per_element) if has_state_here else 0,
        buffers=buffers,
        unsharded_gradients=sum(bucket.sums.nbytes for bucket in trained) if unsharded else 0,
        secondaries=sum(payload.slice_nbytes for payload in secondaries),
        copies=sum(bucket.copy_nbytes for bucket in layout.buckets),
    )
