"""Bind generated code to the storage of a rank: the globals that it names, at addresses that never change.

Parameters and views of them at their places in the arena, gradient slots, collectives, operators.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.comm.base import Bound, Comm, in_turn
from fxzero.comm.wire_copies import bind_bucket_reduce, bind_reduce_of_sums, pack, sums_here, unpack
from fxzero.errors import PlanError
from fxzero.graph.layout import Bucket, InterleavedBucket, Payload
from fxzero.graph.nodes import (
    Role,
    gathered_params,
    grad_fqn,
    is_gather,
    is_inside,
    is_island,
    may_be_missing,
    members,
    operands,
    role,
    started_by,
    wire_format,
)
from fxzero.graph.regions import Region
from fxzero.graph.variant import Stash, Variant
from fxzero.graph.wire import SCALE_DTYPE
from fxzero.memory.arena_plan import Placed, is_partial, scratch_nbytes
from fxzero.memory.lifetimes import Kind
from fxzero.planning.codegen import CALL_PREFIX, NAMES_IN_SOURCE, PLACE_PREFIX, Code
from fxzero.planning.compile_regions import compiled
from fxzero.planning.lengths.frame import with_values
from fxzero.planning.lengths.polynomials import names_of_numbers
from fxzero.planning.plan import VariantPlan
from fxzero.runtime.cuda_streams import Events, bind_events
from fxzero.runtime.gradients import UNREACHED, Gradients
from fxzero.runtime.interleave import copy_in, copy_out
from fxzero.runtime.ranges import Ranges
from fxzero.runtime.shards import Shards, member_of, unflatten
from fxzero.runtime.stopwatch import Stopwatch
from fxzero.runtime.storage import Arena


@dataclass
class Binder:
    """Binds one variant of a plan."""

    planned: VariantPlan
    variant: Variant
    shards: Shards
    gradients: Gradients
    comm: Comm
    arena: Arena
    names: dict[str, Any] = field(default_factory=dict[str, Any])
    """The globals of the code."""
    gathered: dict[fx.Node, dict[str, torch.Tensor]] = field(default_factory=dict[fx.Node, "dict[str, torch.Tensor]"])
    """Maps each all_gather to its parameters, by name."""
    slots: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """Maps each parameter to the slot of its gradient."""
    copies: dict[fx.Node, Callable[[], object]] = field(default_factory=dict[fx.Node, Callable[[], object]])
    """Maps a start to the function that fills its staging buffer, called just before it on the compute stream."""
    from_secondaries: dict[fx.Node, Bound] = field(default_factory=dict[fx.Node, Bound])
    """Maps each gather that leaves secondary shards to the gather that later reads these, inside the node."""

    def __post_init__(self) -> None:
        self.step, self.code = self.planned.step, self.planned.code
        self.placed: Placed = self.planned.arena.placed
        self.secondaries = self.step.secondaries()
        planned_events = self.planned.events
        self.events: Events | None = None
        """The events of two CUDA streams; None where one thread does all."""
        if planned_events is not None:
            self.events = bind_events(self.step, planned_events, torch.cuda, self.shards.device)

    @classmethod
    def memory_for(cls, arena: Arena, nbytes: int) -> Arena:
        """The memory that a plan is bound to: the arena of the model, long enough."""
        arena.reserve(nbytes)
        return arena

    def bind(self) -> dict[str, Callable[..., Any]]:
        """Make the globals of the generated code and define its functions in them.

        Returns:
            forward, backward; gather_kept, which gathers what forward keeps; forward_again, which is the forward to run
            where buckets of the last micro-step are still there; timed_forward and timed_backward, which make a phase
            that a stopwatch measures; strided, which makes the backward for gradients with other strides than traced;
            fork and join, which let a second stream branch off and come back around a phase.
        """
        code, names = self.code, self.names
        starts = self.step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER)
        names |= NAMES_IN_SOURCE | {f"record_{node.name}": call for node, call in self.recorded().items()}
        names |= {name: _called(target) for name, target in code.operators.items()}
        if self.events is not None:
            names["record_begin"] = self.events.begin
        for island in [node for node in self.step.graph.nodes if is_island(node)]:
            island.args[0].keeps_memory = self.comm.gathers_in_place and self.step.sharding.is_alone
        self.shards.keep_secondaries(self.secondaries.values())
        for start in starts:
            bound = self._bind_gather(start) if is_gather(start) else self._bind_reduce(start)
            names |= {start.name: bound.start or _nothing, f"wait_{start.name}": bound.wait or _nothing}
        if not self.step.synchronize:
            self._bind_unsharded()
        self._bind_static()
        for node in code.placed:
            value = node.meta["val"]
            place = self._view(Kind.TEMPORARY, node, value.numel(), value.dtype)
            names[f"{PLACE_PREFIX}{node.name}"] = place.view(value.shape)
        names |= {f"{CALL_PREFIX}{node.name}": self._operator(node) for node in code.undecided}
        names |= names_of_numbers(self.planned.numbers)
        self.finish()
        names |= {start.name: self._launch(start, names[start.name]) for start in starts}
        functions = {"gather_kept": in_turn(*self._gather_kept())} | _define(code, names)
        streams = None if self.events is None else self.events.streams
        functions["fork"], functions["join"] = (streams.fork, streams.join) if streams else (_nothing, _nothing)
        again = names
        if self.step.resident or self.from_secondaries:
            again = names | self._where_buckets_are_there()
            functions["forward_again"] = _define(code, again)["forward"]
        functions["strided"] = functools.lru_cache(maxsize=1)(self._strided)
        functions["timed"] = functools.lru_cache(maxsize=1)(partial(self._timed, again))
        return functions

    def _operator(self, node: fx.Node) -> Callable[..., Any]:
        """The operator of a node, which writes to its place if it has one at this length."""
        shape = self.planned.shapes.get(node)
        if shape is None:
            return torch_internals.direct_call(node.target)
        place = self._view(Kind.TEMPORARY, node, math.prod(shape), node.meta["val"].dtype).view(shape)
        target, out = self.planned.activations.placed[node].variant
        return partial(torch_internals.direct_call(target), **{out: place})

    def _timed(self, again: dict[str, Any], watch: Stopwatch | Ranges) -> dict[str, Callable[..., Any]]:
        """The functions with a call of what looks on after each line of the schedule; made for a few steps."""
        code, mark = self.planned.timed_code(), {"mark": watch.mark} | self._reshapes()
        return _define(code, self.names | mark) | {"forward_again": _define(code, again | mark)["forward"]}

    def _strided(self) -> Callable[..., Any]:
        """The backward for gradients that arrive with other strides than in the trace, such as an expanded one.

        Operators get them as they are, as in eager: the order in which they add may follow from strides.
        """
        return _define(self.code, self.names | self._reshapes())["backward"]

    def _reshapes(self) -> dict[str, Callable[..., object]]:
        """Globals that let views be copies where the strides allow no view."""
        views, reshape = torch.ops.aten.view.default, torch.ops.aten.reshape.default
        return {name: reshape for name, target in self.code.operators.items() if target is views}

    def recorded(self) -> dict[fx.Node, Callable[[], object]]:
        """The functions that the generated code calls after nodes."""
        return {} if self.events is None else dict(self.events.recorded)

    def finish(self) -> None:
        """Called when everything is bound, but for the copies before starts and the order of streams."""

    def _launch(self, start: fx.Node, call: Callable[[], object]) -> Callable[[], object]:
        """The start of a collective behind the copies that it sends, on the communication stream if there is one."""
        copies = self.copies.get(start)
        return in_turn(copies, call) if self.events is None else self.events.start(start, call, copies)

    def _where_buckets_are_there(self) -> dict[str, Callable[..., object]]:
        """Globals for the buckets of the last micro-step: no gather of resident ones; others from secondary shards."""
        names: dict[str, Callable[..., object]] = {}
        for start in self.step.nodes(Role.ALL_GATHER):
            if members(start) in self.step.resident:
                launch, wait = _nothing, _nothing
                if self.events is not None:  # an event stands for the gather
                    passed = torch.cuda.Event()
                    launch, wait = self.events.start(start, passed.record), passed.wait
            elif start in self.from_secondaries:
                launch, wait = self.from_secondaries[start].stage
                launch = self._launch(start, launch)
            else:
                continue
            names |= {start.name: launch, f"wait_{start.name}": wait}
        return names

    def _gather_kept(self) -> list[Callable[[], object]]:
        """The calls that gather again the buckets that forward keeps, in the schedule's order."""
        calls: list[Callable[[], object]] = []
        for node in self.step.nodes(Role.ALL_GATHER, Role.WAIT):
            if not is_gather(node) or members(node) not in self.step.kept or members(node) in self.step.resident:
                continue
            start = started_by(node)
            calls.append(self.names[start.name if node is start else f"wait_{start.name}"])
            if (Kind.STAGING, start) in self.placed and self.shards.device.type == "cuda":
                calls.append(partial(torch.cuda.synchronize, self.shards.device))  # no event of the schedule covers it
        return calls

    def _layout_bucket(self, start: fx.Node) -> Bucket:
        """The bucket of a collective as the layout has it.

        Raises:
            PlanError: the graph has a bucket that the layout does not have.
        """
        fqns = self.step.bucket_of(start).fqns
        bucket = self.shards.layout.bucket_of[fqns[0]]
        if bucket.fqns != fqns:
            raise PlanError(f"The plan gathers {fqns} together; the layout has {bucket.fqns}. Keep the buckets fixed.")
        return bucket

    def _bind_gather(self, start: fx.Node) -> Bound:
        """Bind one all-gather, and note where its parameters lie."""
        bucket = self._layout_bucket(start)
        shard = full = self.shards.sent(bucket)
        if not self.comm.gathers_in_place:
            full = self._whole(Kind.GATHER, start, bucket.gathered)
        self.gathered[start] = unflatten(bucket, full)
        if self.step.is_staged(start):
            return self._bind_staged_gather(start, bucket, shard, full)
        return self._gather_into(start, shard, full)

    def _gather_into(
        self, start: fx.Node, shard: torch.Tensor, full: torch.Tensor, bring: Callable[[], object] | None = None
    ) -> Bound:
        """Gather what travels: from secondary shards, or leaving them where another gather of the step reads them.

        Args:
            bring: a function to call after the wait.
        """
        travels, within = self.step.travels(start), self.secondaries.get(members(start))
        if within is None:
            return self.comm.bind_gather(travels, shard, full).then(bring)
        secondary = self.shards.secondaries.parts[within]
        again = self.comm.bind_gather_inside(travels, secondary, full).then(bring)
        if is_inside(start):
            return again
        self.from_secondaries[start] = again
        return self.comm.bind_gather_keeping(travels, shard, full, secondary).then(bring)

    def _bind_staged_gather(self, start: fx.Node, bucket: Bucket, shard: torch.Tensor, full: torch.Tensor) -> Bound:
        """Gather into a staging buffer; what is sent in another type is a row of it, or of a secondary shard."""
        format, work = wire_format(start), None
        staging = self._whole(Kind.STAGING, start, self.step.travels(start))
        if format is not None:
            if (Kind.QUANTIZE, start) in self.placed:
                work = self._view(Kind.QUANTIZE, start, bucket.shard_numel, SCALE_DTYPE)
            row = self._own_row(start, staging)
            if not is_inside(start):
                self.copies[start] = pack(format, shard, row, work)
            shard = row
        if isinstance(bucket, InterleavedBucket):
            bring = copy_out(bucket, staging, full)
        else:
            assert format is not None
            bring = unpack(format, bucket, staging, full, work)
        return self._gather_into(start, shard, staging, bring)

    def _own_row(self, start: fx.Node, staging: torch.Tensor) -> torch.Tensor:
        """The row in which this rank writes what it sends in a wire format: of the secondary shard, if there is one."""
        row_numel, within = self.step.travels(start).slice_numel, self.secondaries.get(members(start))
        if within is None:
            return staging.split(row_numel)[self.comm.rank]
        return self.shards.secondaries.parts[within].split(row_numel)[self.comm.rank % self.comm.sharding.num_nodes]

    def _view(self, kind: Kind, node: fx.Node, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The memory of a node in the arena, flat."""
        return self.arena.view(self.placed[kind, node][1], numel, dtype)

    def _whole(self, kind: Kind, start: fx.Node, payload: Payload) -> torch.Tensor:
        """The memory of a whole payload in the arena, `[payload.numel]`."""
        return self._view(kind, start, payload.numel, payload.dtype)

    def _bind_reduce(self, start: fx.Node) -> Bound:
        """Bind one reduce-scatter, and the slots of its bucket."""
        bucket, variant = self._layout_bucket(start), self.variant
        shard = full = self.shards.grad_shard(bucket)
        in_arena, is_staged = (Kind.GRADIENT, start) in self.placed, self.step.is_staged(start)
        if in_arena:
            full = self._whole(Kind.GRADIENT, start, bucket.gradients)
        sent = self._whole(Kind.STAGING, start, self.step.travels(start)) if is_staged else full
        clear = _padding(bucket, full) if in_arena else []
        if in_arena and is_partial(self.step, start):
            bound = self._bind_partial(bucket, start, sent)
            clear += [view for fqn, view in unflatten(bucket, full).items() if fqn not in members(start)]
        elif not in_arena and is_partial(self.step, start):  # of one rank; each reduction is of other members
            own = [view for fqn, view in unflatten(bucket, full).items() if fqn in members(start)]
            divide = [partial(view.div_, self.comm.divisor) for view in own] if self.comm.divisor != 1 else []
            bound = Bound(None, None).then(*divide)
        else:
            bound = self._reduce_into(shard, bucket, start, sent, accumulate=variant.accumulate)
        before: list[Callable[[], object]] = [partial(torch_internals.zero_all, clear)] if clear else []
        if variant.stash is Stash.FLUSH:
            before += self._flushing(bucket, full)
        if is_staged:
            is_interleaved = isinstance(bucket, InterleavedBucket)
            bring = copy_in(bucket, full, sent) if is_interleaved else partial(sent.copy_, full)
            self.copies[start] = in_turn(*before, bring)
        elif before:
            bound = Bound(in_turn(*before, bound.start), bound.wait)
        views = unflatten(bucket, full)
        for slot in operands(start):
            fqn = grad_fqn(slot)
            self.slots[fqn] = views[fqn]
            self.names[slot.name] = self._writer(views[fqn], slot, add=False)
        return bound

    def _writer(self, slot: torch.Tensor, node: fx.Node, *, add: bool) -> Callable[..., object]:
        """The function that writes a gradient to its slot.

        One that the step does not reach is `UNREACHED`, from which other ranks' are told: these get positive zeros.
        """
        blank: Callable[..., object] = _nothing if add else partial(slot.fill_, UNREACHED)
        if not node.all_input_nodes:
            return blank
        is_uncertain = may_be_missing(node)
        if add:
            write: Callable[..., object] = slot.add_
        elif self.comm.is_alone and not is_uncertain:
            write = slot.copy_
        else:
            write = partial(torch.add, other=torch.zeros((), dtype=slot.dtype, device=slot.device), out=slot)
        return partial(_write_if_there, write, blank) if is_uncertain else write

    def _reduce_into(
        self, shard: torch.Tensor, bucket: Bucket, start: fx.Node, sent: torch.Tensor, *, accumulate: bool
    ) -> Bound:
        """Average what is sent, in the collective's wire format, into a shard."""
        format, scratch = wire_format(start), None
        if (Kind.SCRATCH, start) in self.placed:
            nbytes = scratch_nbytes(self.step, self.comm.backend, start, accumulate=accumulate)
            scratch = self._view(Kind.SCRATCH, start, nbytes, torch.uint8)
        if self._sends_unsharded(bucket, start):
            assert scratch is not None
            rooms = [self._whole(Kind.GRADIENT, start, bucket.gradients), scratch]
            unsharded = self.gradients.unsharded_bucket(bucket)
            return bind_reduce_of_sums(self.comm, bucket, unsharded, rooms, shard, accumulate=accumulate)
        return bind_bucket_reduce(self.comm, bucket, format, sent, scratch, shard, accumulate=accumulate)

    def _flushing(self, bucket: Bucket, full: torch.Tensor) -> list[Callable[[], object]]:
        """The calls that add the unsharded gradients of no_sync() to those of the last backward.

        They are added in the dtype of sums. The result is in the gradient bucket, if that has or holds this dtype.
        """
        unsharded = self.gradients.unsharded_bucket(bucket)
        if full.dtype is unsharded.dtype:
            return [partial(full.add_, unsharded)]
        add: list[Callable[[], object]] = [
            partial(into.add_, term)
            for into, term in zip(bucket.gradients.slices(unsharded), bucket.gradients.slices(full), strict=True)
        ]
        return add if sums_here(self.comm, bucket) else [*add, partial(full.copy_, unsharded)]

    def _sends_unsharded(self, bucket: Bucket, start: fx.Node) -> bool:
        """True if the sums of several micro-steps travel, which are wider than the gradients of one."""
        return self.variant.stash is Stash.FLUSH and wire_format(start) is None and sums_here(self.comm, bucket)

    def _bind_partial(self, bucket: Bucket, start: fx.Node, sent: torch.Tensor) -> Bound:
        """Reduce a whole bucket aside and keep the slices of some members."""
        room = self._view(Kind.PARTIAL, start, bucket.shard_numel, bucket.dtypes.shard)
        bound = self._reduce_into(room, bucket, start, sent, accumulate=False)
        keep: list[Callable[[], object]] = []
        for param in bucket.params:
            if param.fqn in members(start):
                part = bucket.slice_of(param, self.comm.rank)
                mine = self.shards.grad_view(param.fqn).view(-1)
                write = mine.add_ if self.variant.accumulate else mine.copy_
                keep.append(partial(write, room[part.offset : part.offset + part.numel]))
        return bound.then(*keep)

    def _bind_unsharded(self) -> None:
        """Bind the slots of a step under no_sync()."""
        for slot in self.step.nodes(Role.WRITE_GRAD):
            fqn = grad_fqn(slot)
            bucket = self.shards.layout.bucket_of[fqn]
            view = member_of(bucket, self.gradients.unsharded_bucket(bucket), fqn)
            self.names[slot.name] = self._writer(view, slot, add=self.variant.stash is Stash.MORE)

    def _bind_static(self) -> None:
        """Evaluate parameters, gradient slots, views of them and constants, once."""
        values: dict[fx.Node, Any] = {}
        params = {wait: gathered_params(wait) for wait in self.step.nodes(Role.WAIT) if is_gather(wait)}
        by_node = {node: (wait, fqn) for wait, found in params.items() for fqn, node in found.items()}
        with torch.no_grad():
            for node in self.code.static:
                if role(node) is Role.CONSTANT:
                    values[node] = self.step.constants[cast(str, node.target)]
                elif role(node) is Role.GRAD_SLOT:
                    fqn, shape = cast(tuple[str, tuple[int, ...]], node.args)
                    values[node] = self.slots[fqn].view(shape)
                elif node in by_node:
                    wait, fqn = by_node[node]
                    values[node] = self.gathered[started_by(wait)][fqn]
                else:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                    if self.planned.numbers:
                        args, kwargs = with_values((args, kwargs), self.planned.numbers)
                    values[node] = cast(Any, node.target)(*args, **kwargs)
                self.names[node.name] = values[node]


def _define(code: Code, names: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Run the source in its globals: the functions that it defines."""
    exec(code.compiled(), names)
    # A function holds its globals; were it one of them, only the garbage collector would free the shards.
    return {name: names.pop(name) for name in ("forward", "backward") if name in names}


def _called(target: Any) -> Any:
    """What the code calls for an operator, or for a region."""
    return compiled(target) if isinstance(target, Region) else torch_internals.direct_call(target)


def _nothing() -> None:
    """A collective that has nothing to do at world size 1."""


def _write_if_there(write: Callable[..., object], blank: Callable[..., object], grad: torch.Tensor | None) -> None:
    if grad is None:
        blank()
    else:
        write(grad)


def _padding(bucket: Bucket, full: torch.Tensor) -> list[torch.Tensor]:
    """The elements of a bucket that belong to no parameter: they would enter the norm of the gradients."""
    ends = [(bucket.offsets[p.fqn], bucket.offsets[p.fqn] + p.numel) for p in bucket.params]
    begins = [begin for begin, _ in ends[1:]] + [bucket.numel]
    return [full[end:begin] for (_, end), begin in zip(ends, begins, strict=True) if end < begin]
