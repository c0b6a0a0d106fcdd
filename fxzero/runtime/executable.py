"""Run a plan: bind the generated code to this rank's storage once, then only call it.

Nothing is decided in a step but which binding runs: overwrite or add to `.grad`, no_sync() or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import fx

from fxzero.comm.base import Comm
from fxzero.errors import CommunicationError
from fxzero.graph.aliasing import aliases, base
from fxzero.graph.nodes import Role, info, is_random, members
from fxzero.graph.step import StepGraph
from fxzero.graph.variant import Stash, Variant
from fxzero.memory.arena_plan import plan_arena
from fxzero.memory.lifetimes import MemoryPlan
from fxzero.planning.plan import Plan
from fxzero.reference.transient import TransientBinder, TransientMemory
from fxzero.runtime.binding import Binder
from fxzero.runtime.gradients import Gradients
from fxzero.runtime.residency import Residency
from fxzero.runtime.shards import Shards
from fxzero.runtime.stopwatch import Stopwatch
from fxzero.runtime.storage import Arena


def _lasting_secondaries(step: StepGraph) -> Iterable[tuple[str, ...]]:
    """Buckets that a later forward gathers inside the node; not into buffers that are allocated at each use."""
    return step.secondaries() if step.is_persistent else ()


class Executable:
    """A plan bound to the storage of this rank."""

    def __init__(
        self, plan: Plan, shards: Shards, gradients: Gradients, comm: Comm, arena: Arena, residency: Residency
    ) -> None:
        self.plan = plan
        self._shards, self._gradients, self._comm, self._arena = shards, gradients, comm, arena
        self._residency = residency
        gathered = {members(start) for start in plan.step.nodes(Role.ALL_GATHER)}
        lasting = () if comm.gathers_in_place else (*plan.step.resident, *_lasting_secondaries(plan.step))
        self._lasting = [fqns for fqns in lasting if fqns in gathered]
        """Buckets that are there for the next micro-step, gathered or as secondary shards."""
        self._binder, self._memory = Binder, arena
        if not plan.step.is_persistent:
            self._binder, self._memory = TransientBinder, TransientMemory(shards.device)
        self._functions: dict[Variant, dict[str, Callable[..., Any]]] = {}
        self.memory: dict[Variant, MemoryPlan] = {}
        """The arena's plan for each variant that was bound."""
        step = plan.step
        self.reached = list(step.grads)
        for fqn in self.reached:
            gradients.view(fqn)
        self.reduced = {fqn for start in step.nodes(Role.REDUCE_SCATTER) for fqn in members(start)}
        """The parameters in the buckets that backward reduces."""
        self.buffers = [info(node).fqn for node in step.nodes(Role.BUFFER)]
        """The names of the buffers that forward takes, in order."""
        self.buffer_geometry = [(node.meta["val"].shape, node.meta["val"].dtype) for node in step.nodes(Role.BUFFER)]
        self.device = shards.device
        self.stopwatch: Stopwatch | None = None
        """Measures the next forward, and its backward."""
        self.example_only = False
        """True for a plan that was made from tensors without values."""
        written = {node.args[0] for node in step.graph.nodes if node.target is torch.ops.aten.copy_.default}
        self.written_buffers = [i for i, node in enumerate(step.nodes(Role.BUFFER)) if node in written]
        self.written_inputs = [i for i, node in enumerate(step.nodes(Role.INPUT)) if node in written]
        self.draws_random = any(is_random(node) for node in step.graph.nodes)
        self.tensor_outputs = [i for i, value in enumerate(step.model_outputs) if isinstance(value, fx.Node)]
        """Which of the flat outputs are tensors: they are the outputs of the autograd Function."""
        self.differentiable = frozenset(plan.captured.differentiable)
        outputs = {i: {*aliases(base(cast(fx.Node, step.model_outputs[i])))} for i in self.tensor_outputs}
        held = {alias for node in step.nodes(Role.INPUT, Role.BUFFER) for alias in aliases(node)}.union(
            *outputs.values()
        )
        saved = plan.code.saved
        self.reachable = [i for i, node in enumerate(saved) if node in held]
        """Which saved values share memory with what the user holds."""
        self._tangents = [node.meta["val"].stride() for node in step.nodes(Role.TANGENT)]
        self.saved_outputs = [i for i, memory in outputs.items() if not memory.isdisjoint(saved)]
        """Outputs that share memory with saved values."""

    @property
    def step(self) -> StepGraph:
        return self.plan.step

    @property
    def leaves_buckets(self) -> bool:
        """True if the next micro-step gathers less than this one, or nothing."""
        return bool(self._lasting)

    def forward(self, inputs: list[torch.Tensor], buffers: list[torch.Tensor]) -> tuple[tuple[Any, ...], list[Any]]:
        """Run the forward phase: the flat outputs and what backward needs."""
        unused = Variant(False, Stash.NONE if self.step.synchronize else Stash.FIRST)
        functions = self._bound(next(iter(self._functions), unused))
        are_there = self._lasting and self._residency.has(self._lasting)
        watch = self.stopwatch
        try:
            if watch is not None:
                outputs = watch.time_phase(functions["timed_forward"](watch), inputs, buffers, is_first=True)
            else:
                outputs = functions["forward_again" if are_there else "forward"](inputs, buffers)
        except Exception as error:
            self._abandon(error)
            raise
        self._comm.drain()
        self._arena.generation += 1
        self._residency.add(self._lasting)
        return outputs

    def backward(self, variant: Variant, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run the backward phase: the gradients of the inputs; both lists are emptied as values are used."""
        for index, (tangent, strides) in enumerate(zip(tangents, self._tangents, strict=True)):
            if tangent.stride() != strides:  # an expanded gradient, of sum() say: operators were traced for dense ones
                tangents[index] = tangent.new_empty_strided(tangent.shape, strides).copy_(tangent)
        watch, self.stopwatch = self.stopwatch, None
        try:
            if watch is not None:
                backward = self._bound(variant)["timed_backward"](watch)
                input_grads = watch.time_phase(backward, saved, tangents, is_first=False)
            else:
                input_grads = self._bound(variant)["backward"](saved, tangents)
        except Exception as error:
            self._abandon(error)
            raise
        self._comm.drain()
        self._arena.generation += 1
        return input_grads

    def _abandon(self, error: Exception) -> None:
        """Leave nothing in flight behind an error of the model's own."""
        self._arena.generation += 1
        self._residency.expire()
        if not isinstance(error, CommunicationError):
            self._comm.abandon()

    @property
    def generation(self) -> int:
        """Of the arena; it changes with every phase of any plan."""
        return self._arena.generation

    def restore_kept(self, generation: int) -> None:
        """Gather again what a forward kept, if other phases have run since and may have used its memory."""
        if self.step.kept and generation != self._arena.generation:
            if self._shards.device.type == "cuda":
                torch.cuda.synchronize(self._shards.device)  # the events of the schedule do not cover this rare gather
            next(iter(self._functions.values()))["gather_kept"]()
            self._comm.drain()

    def pattern_of(self, arriving: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
        """Which outputs receive a gradient, as indices of the flat outputs."""
        return tuple([i for i, grad in zip(self.tensor_outputs, arriving, strict=True) if grad is not None])

    def _bound(self, variant: Variant) -> dict[str, Callable[..., Any]]:
        if variant not in self._functions:
            with torch.inference_mode(False):  # views made in it could not be written outside
                plan, placed = plan_arena(self.step, self._comm.backend, variant)
                self.memory[variant] = plan
                self._memory.reserve(plan.peak_bytes)
                storage = self._shards, self._gradients, self._comm, self._memory
                self._functions[variant] = self._binder(self.plan.code, self.step, *storage, placed, variant).bind()
        return self._functions[variant]
