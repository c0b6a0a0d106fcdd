"""Run a plan: bind the generated code to this rank's storage once, then only call it.

A binding makes the globals that the code names: parameters and views of them at their addresses in the arena, gradient
slots, collectives. Nothing is decided in a step but which binding runs: overwrite or add to `.grad`, no_sync() or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from fxzero import compat
from fxzero.capture import Captured
from fxzero.codegen import NAMES_IN_SOURCE, Code, generate
from fxzero.comm import Bound, Comm
from fxzero.cuda import Placed, plan_cuda_events
from fxzero.errors import PlanError
from fxzero.gradients import Gradients, Stash, Variant
from fxzero.ir import (
    Role,
    StepGraph,
    aliases,
    base,
    grad_fqn,
    info,
    is_gathered_param,
    is_random,
    members,
    operands,
    role,
    started_by,
)
from fxzero.layout import Bucket
from fxzero.memory import (
    Arena,
    Buffer,
    MemoryPlan,
    gather_buffers,
    gradient_buffers,
    plan_memory,
    working_buffers,
)
from fxzero.shards import Shards, unflatten


@dataclass(frozen=True)
class Plan:
    """All that is decided about a step, before it is bound to memory."""

    captured: Captured
    code: Code

    @property
    def step(self) -> StepGraph:
        return self.captured.step


def plan_arena(step: StepGraph, comm: Comm, variant: Variant) -> tuple[MemoryPlan, Placed]:
    """Place the communication memory of one variant of a step.

    What all variants need lies at the same place in all of them, so that a bucket that forward keeps is found by whichever
    backward follows; what only an accumulating backward needs lies behind it.

    Returns:
        The plan, and each buffer and its offset in bytes, by kind and the start of its collective.
    """
    common: dict[tuple[str, fx.Node], Buffer] = {}
    extra: dict[tuple[str, fx.Node], Buffer] = {}
    gradients = {("gradient", start): buffer for start, buffer in gradient_buffers(step).items()}
    if comm.gathers_in_place:
        extra |= gradients if variant.accumulate else {}
    else:
        common |= {("gather", start): buffer for start, buffer in gather_buffers(step).items()} | gradients
    reduces = {start: step.bucket_of(start) for start in step.nodes(Role.REDUCE_SCATTER)}
    for needed, accumulate in ((common, False), (extra, True)):
        if variant.accumulate or not accumulate:
            nbytes = {
                start: comm.reduce_scratch_numel(bucket, accumulate=accumulate) * bucket.dtype.itemsize
                for start, bucket in reduces.items()
            }
            needed |= {("scratch", start): buffer for start, buffer in working_buffers(step, "scratch", nbytes).items()}
    some = {start: bucket.shard_nbytes for start, bucket in reduces.items() if _is_partial(step, start)}
    common |= {("partial", start): buffer for start, buffer in working_buffers(step, "partial", some).items()}
    first, second = plan_memory(list(common.values())), plan_memory(list(extra.values()))
    offsets = (*first.offsets, *(first.peak_bytes + offset for offset in second.offsets))
    plan = MemoryPlan((*first.buffers, *second.buffers), offsets)
    plan.verify()
    return plan, dict(zip([*common, *extra], zip(plan.buffers, plan.offsets, strict=True), strict=True))


class Executable:
    """A plan bound to the storage of this rank."""

    def __init__(self, plan: Plan, shards: Shards, gradients: Gradients, comm: Comm, arena: Arena) -> None:
        self.plan = plan
        self._shards, self._gradients, self._comm, self._arena = shards, gradients, comm, arena
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
        held = {alias for node in step.nodes(Role.INPUT, Role.BUFFER) for alias in aliases(node)}.union(*outputs.values())
        saved = plan.code.saved
        self.reachable = [i for i, node in enumerate(saved) if node in held]
        """Which saved values share memory with what the user holds."""
        self.saved_outputs = [i for i, memory in outputs.items() if not memory.isdisjoint(saved)]
        """Outputs that share memory with saved values."""

    @property
    def step(self) -> StepGraph:
        return self.plan.step

    def forward(self, inputs: list[torch.Tensor], buffers: list[torch.Tensor]) -> tuple[tuple[Any, ...], list[Any]]:
        """Run the forward phase: the flat outputs and what backward needs."""
        unused = Variant(False, Stash.NONE if self.step.synchronize else Stash.FIRST)
        outputs = self._bound(next(iter(self._functions), unused))["forward"](inputs, buffers)
        self._comm.drain()
        self._arena.generation += 1
        return outputs

    def backward(self, variant: Variant, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run the backward phase: the gradients of the inputs; both lists are emptied as values are used."""
        input_grads = self._bound(variant)["backward"](saved, tangents)
        self._comm.drain()
        self._arena.generation += 1
        return input_grads

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
                self._functions[variant] = self._bind(variant)
        return self._functions[variant]

    # -- binding -------------------------------------------------------------------------------------------------

    def _bind(self, variant: Variant) -> dict[str, Callable[..., Any]]:
        """Make the globals of the generated code for one variant, and define its functions in them."""
        plan, placed = plan_arena(self.step, self._comm, variant)
        self.memory[variant] = plan
        self._arena.reserve(plan.peak_bytes)
        code, names = self.plan.code, dict[str, Any](NAMES_IN_SOURCE)
        events = None
        if self._shards.device.type == "cuda" and self._comm.world_size > 1:
            events = plan_cuda_events(
                self.step, placed, torch.cuda, self._shards.device, accumulate=variant.accumulate
            )
            code = generate(self.step, events.recorded, record_begin=events.begin is not None)
            names |= {"record_begin": events.begin}
            names |= {f"record_{node.name}": record for node, record in events.recorded.items()}
        names |= {name: compat.direct_call(target) for name, target in code.operators.items()}
        gathered: dict[fx.Node, dict[str, torch.Tensor]] = {}
        for start in self.step.nodes(Role.ALL_GATHER):
            full = self._gathered(start, placed)
            gathered[start] = unflatten(self.step.bucket_of(start), full)
            bucket = self._layout_bucket(start)
            bound = self._comm.bind_gather(bucket, self._shards.params.parts[bucket], full)
            self._bind_collective(names, start, bound)
        slots: dict[str, torch.Tensor] = {}
        for start in self.step.nodes(Role.REDUCE_SCATTER):
            self._bind_reduce(names, slots, start, placed, variant)
        if not self.step.synchronize:
            self._bind_unsharded(names, variant)
        self._bind_static(names, gathered, slots)
        if events is not None:
            for start in self.step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER):
                names[start.name] = events.start(start, names[start.name])
        kept = [start for start in self.step.nodes(Role.ALL_GATHER) if members(start) in self.step.kept]
        gather_kept = [names[start.name] for start in kept] + [names[f"wait_{start.name}"] for start in kept]
        exec(compile(code.source, "<fxzero schedule>", "exec"), names)
        # A function holds its globals; were it one of them, only the garbage collector would free the shards.
        functions = {name: names.pop(name) for name in ("forward", "backward") if name in names}
        return {**functions, "gather_kept": _in_turn(*gather_kept)}

    def _layout_bucket(self, start: fx.Node) -> Bucket:
        """The bucket of a collective as the layout has it.

        Raises:
            PlanError: the graph has a bucket that the layout does not have.
        """
        fqns = self.step.bucket_of(start).fqns
        bucket = self._shards.layout.bucket_of[fqns[0]]
        if bucket.fqns != fqns:
            raise PlanError(f"The plan gathers {fqns} together; the layout has {bucket.fqns}. Keep the buckets fixed.")
        return bucket

    def _gathered(self, start: fx.Node, placed: Placed) -> torch.Tensor:
        bucket = self._layout_bucket(start)
        if self._comm.gathers_in_place:
            return self._shards.params.parts[bucket]
        return self._arena.view(placed["gather", start][1], bucket.numel, bucket.dtype)

    def _bind_collective(self, names: dict[str, Any], start: fx.Node, bound: Bound) -> None:
        names[start.name] = bound.start or _nothing
        names[f"wait_{start.name}"] = bound.wait or _nothing

    def _bind_reduce(
        self,
        names: dict[str, Any],
        slots: dict[str, torch.Tensor],
        start: fx.Node,
        placed: Placed,
        variant: Variant,
    ) -> None:
        """Bind one reduce-scatter and the slots of its bucket, which are added to `slots` by parameter."""
        bucket = self._layout_bucket(start)
        shard = self._shards.grad_shard(bucket)
        if ("gradient", start) in placed:
            full = self._arena.view(placed["gradient", start][1], bucket.numel, bucket.dtype)
        else:
            full = shard
        scratch = None
        if ("scratch", start) in placed:
            numel = self._comm.reduce_scratch_numel(bucket, accumulate=variant.accumulate)
            scratch = self._arena.view(placed["scratch", start][1], numel, bucket.dtype)
        in_arena = ("gradient", start) in placed
        if _is_partial(self.step, start) and full is not shard:
            room = self._arena.view(placed["partial", start][1], bucket.shard_numel, bucket.dtype)
            bound = self._bind_partial(bucket, members(start), full, scratch, room, variant)
            unused = [view for fqn, view in unflatten(bucket, full).items() if fqn not in members(start)]
        else:
            bound = self._comm.bind_reduce(bucket, full, scratch, shard, accumulate=variant.accumulate)
            unused = []
        before: list[Callable[[], object]] = []
        if in_arena and (clear := [*_padding(bucket, full), *unused]):
            before.append(partial(compat.zero_all, clear))
        if variant.stash is Stash.FLUSH:
            before.append(partial(full.add_, self._gradients.unsharded_bucket(bucket)))
        if before:
            bound = Bound(_in_turn(*before, bound.start), bound.wait)
        self._bind_collective(names, start, bound)
        views = unflatten(bucket, full)
        for slot in operands(start):
            slots[grad_fqn(slot)] = views[grad_fqn(slot)]
            names[slot.name] = _writer(views[grad_fqn(slot)], slot, add=False)

    def _bind_partial(
        self,
        bucket: Bucket,
        fqns: tuple[str, ...],
        full: torch.Tensor,
        scratch: torch.Tensor | None,
        room: torch.Tensor,
        variant: Variant,
    ) -> Bound:
        """Reduce a whole bucket into `room` and keep the slices of some members."""
        bound = self._comm.bind_reduce(bucket, full, scratch, room, accumulate=False)
        keep: list[Callable[[], object]] = []
        for param in bucket.params:
            if param.fqn in fqns:
                part = bucket.slice_of(param, self._comm.rank)
                mine = self._shards.grad_view(param.fqn)
                write = mine.add_ if variant.accumulate else mine.copy_
                keep.append(partial(write, room[part.offset : part.offset + part.numel]))
        return Bound(bound.start, _in_turn(bound.wait, *keep))

    def _bind_unsharded(self, names: dict[str, Any], variant: Variant) -> None:
        """Bind the slots of a step under no_sync()."""
        for slot in self.step.nodes(Role.WRITE_GRAD):
            fqn = grad_fqn(slot)
            bucket = self._shards.layout.bucket_of[fqn]
            view = unflatten(bucket, self._gradients.unsharded_bucket(bucket))[fqn]
            names[slot.name] = _writer(view, slot, add=variant.stash is Stash.MORE)

    def _bind_static(
        self,
        names: dict[str, Any],
        gathered: dict[fx.Node, dict[str, torch.Tensor]],
        slots: dict[str, torch.Tensor],
    ) -> None:
        """Evaluate parameters, gradient slots, views of them and constants, once."""
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self.plan.code.static:
                if role(node) is Role.CONSTANT:
                    values[node] = self.step.constants[cast(str, node.target)]
                elif role(node) is Role.GRAD_SLOT:
                    fqn, shape = cast(tuple[str, tuple[int, ...]], node.args)
                    values[node] = slots[fqn].view(shape)
                elif is_gathered_param(node):
                    wait = cast(fx.Node, node.args[0])
                    fqns = self.step.bucket_of(wait).fqns
                    values[node] = gathered[started_by(wait)][fqns[cast(int, node.args[1])]]
                else:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                    values[node] = cast(Any, node.target)(*args, **kwargs)
                names[node.name] = values[node]


def _nothing() -> None:
    """A collective that has nothing to do at world size 1."""


def _in_turn(*functions: Callable[[], object] | None) -> Callable[[], object]:
    """One function that calls those that are there, in order."""
    calls = [function for function in functions if function is not None]

    def all_of_them() -> None:
        for call in calls:
            call()

    return all_of_them


def _is_partial(step: StepGraph, start: fx.Node) -> bool:
    """True for a reduce_scatter of some members of the bucket of its gather."""
    return members(start) != step.bucket_of(start).fqns


def _writer(slot: torch.Tensor, node: fx.Node, *, add: bool) -> Callable[..., object]:
    """What writes a gradient to its slot; a gradient the step does not reach is zeros."""
    if not node.all_input_nodes:
        return _nothing if add else slot.zero_
    return slot.add_ if add else slot.copy_


def _padding(bucket: Bucket, full: torch.Tensor) -> list[torch.Tensor]:
    """The elements of a bucket that belong to no parameter: they would enter the norm of the gradients."""
    ends = [(bucket.offsets[p.fqn], bucket.offsets[p.fqn] + p.numel) for p in bucket.params]
    begins = [begin for begin, _ in ends[1:]] + [bucket.numel]
    return [full[end:begin] for (_, end), begin in zip(ends, begins, strict=True) if end < begin]
