"""Run a plan: bind the generated code to this rank's storage once, then only call it.

Nothing is decided in a step but which binding runs: overwrite or add to `.grad`, no_sync() or not.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import fx, nn

from fxzero import torch_internals
from fxzero.comm.base import Comm
from fxzero.cost.measured import MEASURED_STEPS, MeasuredLines
from fxzero.graph.aliasing import aliases, base
from fxzero.graph.new_values import Computation
from fxzero.graph.nodes import Role, grad_fqn, info, is_island, is_random, may_be_missing, members
from fxzero.graph.recipe import Fqns
from fxzero.graph.regions import is_region
from fxzero.graph.step import Phase, StepGraph, is_read_in_backward
from fxzero.graph.variant import Variant
from fxzero.planning.narrow import narrow
from fxzero.planning.plan import Plan, VariantPlan
from fxzero.runtime.binding import Binder
from fxzero.runtime.gradients import Gradients
from fxzero.runtime.graphs.phases import PhaseGraphs
from fxzero.runtime.in_flight import InFlight
from fxzero.runtime.ranges import Ranges
from fxzero.runtime.shards import Shards
from fxzero.runtime.stopwatch import Stopwatch
from fxzero.runtime.storage import Arena

Writes: TypeAlias = tuple[Fqns, int]
"""Names of parameters, and a digest of how their new values are computed."""


@dataclass(frozen=True)
class Storage:
    """What a plan is bound to on this rank; all plans of a model share it."""

    shards: Shards
    params: Mapping[str, nn.Parameter]
    """The user's Parameter objects; their data is their shard, or what the user put in its place."""
    gradients: Gradients
    comm: Comm
    arena: Arena
    in_flight: InFlight


class Executable:
    """One graph of a plan, bound to the storage of this rank: that of ordinary steps, or that of steps under no_sync().

    Args:
        binder: binds a variant; a slower form of it may be put in its place.
    """

    def __init__(self, plan: Plan, *, synchronize: bool, storage: Storage, binder: type[Binder] = Binder) -> None:
        self.plan, form = plan, plan.form(synchronize=synchronize)
        self._synchronize, self._storage, self._in_flight = synchronize, storage, storage.in_flight
        self._binder, self._memory = binder, binder.memory_for(storage.arena, plan.arena_bytes)
        self._functions: dict[Variant, dict[str, Callable[..., Any]]] = {}
        self._narrowed: dict[tuple[int, ...], Executable] = {}
        self._is_narrowed = False
        self._variants = [variant for variant, planned in plan.variants.items() if planned.step is form.step]
        self.step = step = form.step
        self.has_backward = step.has_backward
        self.num_inputs = len(step.nodes(Role.INPUT))
        """Tensors of the call that forward takes; values of the Python state follow them."""
        self._lasting = _lasting(step)
        """The buckets that are there for the next micro-step, gathered or as secondary shards."""
        self.uncertain = [grad_fqn(slot) for slot in step.nodes(Role.WRITE_GRAD) if may_be_missing(slot)]
        """The parameters of islands, which a step may not reach."""
        self.reached = tuple(fqn for fqn in step.grads if fqn not in self.uncertain)
        for fqn in step.grads:
            storage.gradients.view(fqn)
        self.reduced = {fqn for start in step.nodes(Role.REDUCE_SCATTER) for fqn in members(start)}
        """The parameters in the buckets that backward reduces."""
        self.has_gradients = bool(step.grads or self.reduced)
        """False for a backward that gives gradients to inputs alone, since all parameters are frozen."""
        self.reduced_outside = self.reduced
        """Those that the plan reduces where gradients are reduced."""
        if not step.synchronize:
            self.reduced_outside = {fqn for each in plan.step.nodes(Role.REDUCE_SCATTER) for fqn in members(each)}
        others = self.uncertain if storage.comm.is_alone else self.reduced.difference(self.reached)
        self.unreached = sorted(others)
        """Those of them that this rank, or another one, may not reach: who did is told from their gradients."""
        for fqn in self.unreached:
            storage.gradients.view(fqn)
        self.buffers = [info(node).fqn for node in step.nodes(Role.BUFFER)]
        """The names of the buffers that forward takes, in order."""
        self.buffer_geometry = [(node.meta["val"].shape, node.meta["val"].dtype) for node in step.nodes(Role.BUFFER)]
        self.device = plan.devices.compute
        self.stopwatch: Stopwatch | None = None
        """Measures the next forward, and its backward."""
        self.graphs: PhaseGraphs | None = None
        """Replays the phases, once that was decided."""
        self._ranges: Ranges | None = None
        """Shows the lines of the schedule to a profiler."""
        self._lines: Stopwatch | None = None
        """Measures the lines of the schedule for somebody who asked for that."""
        self.example_only = False
        """True for a plan that was made from tensors without values."""
        written = {node.args[0] for node in step.graph.nodes if node.target is torch.ops.aten.copy_.default}
        self.written_buffers = [i for i, node in enumerate(step.nodes(Role.BUFFER)) if node in written]
        self.written_inputs = [i for i, node in enumerate(step.arguments) if node in written]
        self.written = tuple(step.written)
        """The names of the parameters that forward writes."""
        self.reads_written = any(
            is_read_in_backward(plan.captured.step, value) for value in plan.captured.step.new_values.values()
        )
        """True if backward reads the new value of a parameter that forward writes."""
        self._computation = Computation(plan.captured.step) if step.written and not storage.comm.is_alone else None
        self.has_islands = any(is_island(node) for node in step.graph.nodes)
        self.has_regions = any(is_region(node) for node in step.graph.nodes)
        """True if compute is fused: what is compiled takes gradients with the strides of the trace alone."""
        self.draws_random = any(is_random(node) for node in step.graph.nodes)
        returned = step.model_outputs[: len(step.model_outputs) - len(step.written)]
        self.tensor_outputs = [i for i, value in enumerate(returned) if isinstance(value, fx.Node)]
        """Which of the flat outputs are tensors: they are the outputs of the autograd Function."""
        self.differentiable = frozenset(plan.captured.differentiable)
        self.is_settled = storage.comm.is_alone
        """True once ranks know for which outputs the forwards of its mode save values."""
        outputs = {i: {*aliases(base(cast(fx.Node, step.model_outputs[i])))} for i in self.tensor_outputs}
        given = [*step.nodes(Role.INPUT, Role.STATE, Role.BUFFER), *map(base, step.observed)]
        held = {alias for node in given for alias in aliases(node)}.union(*outputs.values())
        saved = form.code.saved
        tensors = [i for i, node in enumerate(saved) if isinstance(node.meta["val"], torch.Tensor)]
        self.reachable = [i for i in tensors if saved[i] in held]
        """Which saved values share memory with what the user holds."""
        self._tangents = [node.meta["val"].stride() for node in step.nodes(Role.TANGENT)]
        also_differentiated = {step.model_outputs[i] for i in self.differentiable}
        fixed = [i for i in self.tensor_outputs if i not in self.differentiable]
        is_repeated = [i for i in fixed if step.model_outputs[i] in also_differentiated]
        is_saved = [i for i, memory in outputs.items() if not memory.isdisjoint(saved)]
        self.outputs_to_detach = sorted({*is_saved, *is_repeated})
        """Outputs that share memory with saved values, or are another output detached: each needs its own tensor."""

    def at_length(self, plan: Plan, tangents: Sequence[tuple[int, ...]]) -> "Executable":
        """A graph like this one, of a plan for another length: nodes and collectives are equal, sizes differ.

        Args:
            plan: a predicted plan.
            tangents: the strides that gradients of outputs have in it.
        """
        other = copy.copy(self)
        other.plan, other._tangents = plan, list(tangents)
        other._memory = self._binder.memory_for(self._storage.arena, plan.arena_bytes)
        other._functions, other._narrowed = {}, {}
        other.stopwatch = other._lines = other._ranges = other.graphs = None
        return other

    @property
    def form(self) -> VariantPlan:
        """The first variant of the graph; `step` has equal nodes, though maybe sizes of another length."""
        return self.plan.form(synchronize=self._synchronize)

    @property
    def has_run(self) -> bool:
        """True once a forward of it ran."""
        return bool(self._functions)

    @property
    def leaves_buckets(self) -> bool:
        """True if the next micro-step gathers less than this one, or nothing."""
        return bool(self._lasting)

    def forward(self, inputs: list[torch.Tensor], buffers: list[torch.Tensor]) -> tuple[tuple[Any, ...], list[Any]]:
        """Run the forward phase: the flat outputs and what backward needs."""
        functions = self._bound(next(iter(self._functions), self._variants[0]))
        are_there = self._in_flight.begin_forward(self._lasting)
        watch, name = self.stopwatch, "forward_again" if are_there else "forward"
        try:
            outputs: tuple[tuple[Any, ...], list[Any]]
            if self.graphs is not None and watch is None:
                outputs = self.graphs.forward(functions, name, inputs, buffers)
            else:
                is_plain = watch is None and not torch_internals.is_profiling()
                run = functions[name] if is_plain else self._observed(functions, name, Phase.FORWARD, watch)
                outputs = run(inputs, buffers)
            self._in_flight.end_forward(self._lasting)
            if self.written:
                outputs = self._write_params(*outputs)
        except Exception as error:
            self._in_flight.failed(error)
            raise
        return outputs

    @property
    def written_params(self) -> list[torch.Tensor]:
        """This rank's slices of the parameters that forward writes."""
        return [self._storage.params[fqn].data for fqn in self.written]

    def writes(self, state: Sequence[Any]) -> Writes | None:
        """The parameters that a forward has written, and what tells whether all ranks wrote the same.

        Args:
            state: the inputs that are Python state.
        """
        return None if self._computation is None else (self.step.written, self._computation.digest(state))

    def _write_params(self, outputs: tuple[Any, ...], saved: list[Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """Copy this rank's slices of new values of parameters, the last outputs; what forward returns without them."""
        written = self.written
        own, values = outputs[: -len(written)], outputs[-len(written) :]
        phases, before = self._storage.comm.phases, self._in_flight.before_writes
        may_be_undone = phases.is_together and bool(phases.members)
        for fqn, data, value in zip(written, self.written_params, values, strict=True):
            if may_be_undone and fqn not in before:
                before[fqn] = data.clone()
            data.copy_(self._storage.shards.cut(fqn, value))
        self._in_flight.after_write(written)
        return own, saved

    def backward(self, variant: Variant, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run the backward phase: the gradients of the inputs; both lists are emptied as values are used."""
        are_dense = [tangent.stride() for tangent in tangents] == self._tangents
        if self.has_regions and not are_dense:
            tangents[:] = map(_with_strides, tangents, self._tangents)
            are_dense = True
        if self._is_narrowed and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # its events do not cover the forward, which another has run
        functions = self._bound(variant)
        watch, self.stopwatch = self.stopwatch, None
        self._in_flight.begin_backward()
        try:
            if self.graphs is not None and watch is None and are_dense:
                input_grads = self.graphs.backward(variant, functions, saved, tangents)
            else:
                if watch is None and not torch_internals.is_profiling():
                    run = functions["backward"] if are_dense else functions["strided"]()
                else:
                    run = self._observed(functions, "backward", Phase.BACKWARD, watch)
                input_grads = run(saved, tangents)
            self._in_flight.end_backward()
        except Exception as error:
            self._in_flight.failed(error)
            raise
        return input_grads

    def _observed(
        self, functions: Mapping[str, Callable[..., Any]], name: str, phase: Phase, watch: Stopwatch | None
    ) -> Callable[..., Any]:
        """A phase that a stopwatch measures, or in which a profiler finds the lines of the schedule, or both."""
        if torch_internals.is_profiling():
            ranges = self._ranges = self._ranges or Ranges(self.step)
            ranges.also = watch
            run = partial(ranges.run, phase, functions["timed"](ranges)[name])
        else:
            run = functions["timed"](watch)[name]
        if watch is None:
            return run
        is_last = phase is Phase.BACKWARD or not self.has_backward
        return partial(watch.time_phase, run, is_first=phase is Phase.FORWARD, is_last=is_last)

    def measure_lines(self) -> MeasuredLines:
        """The seconds of each line of the schedule over up to 8 steps; the first call begins to measure them."""
        if self._lines is None:
            self._lines = Stopwatch(cuda=torch.cuda if self.device.type == "cuda" else None)
        self._lines.read()
        return MeasuredLines(len(self._lines.walls), self._lines.wall_medians(), self._lines.medians())

    @property
    def lines_to_measure(self) -> Stopwatch | None:
        """What measures the next step because somebody asked for the seconds of its lines."""
        lines = self._lines
        return lines if lines is not None and lines.num_steps < MEASURED_STEPS else None

    def restore_kept(self, generation: int) -> None:
        """Gather again what a forward kept, if other phases have run since and may have used its memory.

        Args:
            generation: of the phases, as it was after that forward.
        """
        if self.step.kept and generation != self._in_flight.generation:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the events of the schedule do not cover this rare gather
            next(iter(self._functions.values()))["gather_kept"]()
            self._storage.comm.drain()

    def pattern_of(self, arriving: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
        """Which outputs receive a gradient, as indices of the flat outputs."""
        return tuple([i for i, grad in zip(self.tensor_outputs, arriving, strict=True) if grad is not None])

    def outputs_computed_from(self, index: int) -> set[int]:
        """The other outputs that forward computes from an output, as indices of the flat outputs."""
        step = self.plan.captured.step  # where no region reads more than one of its results is computed from
        places = {output: i for i, output in enumerate(step.model_outputs) if isinstance(output, fx.Node)}
        source = cast(fx.Node, step.model_outputs[index])
        behind = {source}
        for node in step.graph.nodes:
            if not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
        return {place for node, place in places.items() if node in behind and node is not source}

    def narrowed(self, pattern: tuple[int, ...]) -> "Executable":
        """What runs backward, behind a forward of this one, where some of the differentiated outputs get a gradient."""
        if pattern not in self._narrowed:
            plan = narrow(self.plan, pattern)
            self._narrowed[pattern] = Executable(
                plan, synchronize=self._synchronize, storage=self._storage, binder=self._binder
            )
            self._narrowed[pattern]._is_narrowed = True
        return self._narrowed[pattern]

    def _bound(self, variant: Variant) -> dict[str, Callable[..., Any]]:
        functions = self._functions.get(variant)
        if functions is None:
            with torch.inference_mode(False):  # views made in it could not be written outside
                storage = self._storage
                parts = storage.shards, storage.gradients, storage.comm, self._memory
                planned = (self.plan.bindings or self.plan.variants)[variant]
                functions = self._functions[variant] = self._binder(planned, variant, *parts).bind()
        return functions


def _with_strides(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The tensor itself, or a copy that has these strides."""
    return tensor if tensor.stride() == strides else tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


class BoundPlan:
    """A plan bound to the storage of this rank: both of its graphs, of which a step under no_sync() has one of its own.

    Args:
        binder: see `Executable`.
    """

    def __init__(self, plan: Plan, storage: Storage, binder: type[Binder] = Binder) -> None:
        self.plan = plan
        self.reducing = Executable(plan, synchronize=True, storage=storage, binder=binder)
        self.holding = self.reducing
        if plan.form(synchronize=False).step is not plan.step:
            self.holding = Executable(plan, synchronize=False, storage=storage, binder=binder)

    def at_length(self, plan: Plan, tangents: Sequence[tuple[int, ...]]) -> "BoundPlan":
        """A plan for another length, bound to the same storage; see `Executable.at_length`."""
        other = copy.copy(self)
        other.plan = plan
        other.reducing = other.holding = self.reducing.at_length(plan, tangents)
        if self.holding is not self.reducing:
            other.holding = self.holding.at_length(plan, tangents)
        return other

    def executable(self, *, synchronize: bool) -> Executable:
        """What a call runs.

        Args:
            synchronize: False under no_sync().
        """
        return self.reducing if synchronize else self.holding


def _lasting(step: StepGraph) -> list[Fqns]:
    """The buckets of a step that a later forward finds gathered, or gathers inside the node.

    Secondary shards are not among them where buffers are allocated at each use.
    """
    if step.sharding.shard_ranks == 1:  # the shards are the buckets
        return []
    gathered = {members(start) for start in step.nodes(Role.ALL_GATHER)}
    secondaries = step.secondaries() if step.is_persistent else ()
    return [fqns for fqns in (*step.resident, *secondaries) if fqns in gathered]
