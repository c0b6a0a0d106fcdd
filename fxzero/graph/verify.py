"""Prove a schedule safe, before the first pass and after each.

There are two levels: rules of any graph (`verify_graph`), and rules of a complete plan (`verify_complete`), such as a
reduction of each gradient and a release of each bucket. `verify_plan` checks both.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.errors import (
    BucketError,
    DoubleReleaseError,
    GradientMemoryError,
    GradientReduceError,
    InsideGatherError,
    MalformedGraphError,
    MissingReleaseError,
    MissingWaitError,
    ParameterWriteError,
    PhaseError,
    ReadWithoutGatherError,
    RegionInputError,
    UseAfterReleaseError,
    WireFormatError,
)
from fxzero.graph import ops
from fxzero.graph.aliasing import in_memory_of, memory_of, written_by
from fxzero.graph.names import bucket_label, describe
from fxzero.graph.nodes import (
    WAIT_OF_MODEL,
    Role,
    collective_name,
    gathered_params,
    grad_fqn,
    grad_of,
    info,
    is_gather,
    is_inside,
    may_write,
    members,
    model_collective,
    role,
    sent_until,
    slot_fqn,
    started_by,
    wire_format,
    written_in_place,
)
from fxzero.graph.regions import geometry, region_inputs, region_of, region_places
from fxzero.graph.step import Phase, StepGraph
from fxzero.graph.wire import WireFormat


def verify_graph(step: StepGraph) -> None:
    """Check the rules of any graph, complete or not.

    Raises:
        ScheduleError: the subclass names the broken rule.
    """
    _check_buckets(step)
    _check_wire_formats(step)
    _check_inside_gathers(step)
    _Walk(step).check()
    _check_written_and_reduced_once(step)
    _check_gradient_memory(step)


class _Walk:
    """Checks the nodes of a step one after another, with the state of all collectives at that point."""

    def __init__(self, step: StepGraph) -> None:
        self.step = step
        self.phase = Phase.FORWARD
        self.shards = set(step.param_nodes().values()) if step.nodes(Role.ALL_GATHER) else set[fx.Node]()
        """Placeholders that only gathers may read."""
        self.guarded = set(self.shards)
        """Nodes whose readers are checked: these placeholders, and what lies in the memory of gathered buckets."""
        self.seen: set[fx.Node] = set()
        self.started: dict[fx.Node, Phase] = {}
        self.waited: set[fx.Node] = set()
        self.released: set[fx.Node] = set()
        gathers = step.nodes(Role.ALL_GATHER) if step.kept else []
        self.kept = {start for start in gathers if members(start) in step.kept}
        self.owner: dict[fx.Node, tuple[fx.Node, str]] = {}
        """Maps a node in the memory of a gathered bucket to the all-gather and to the name of the parameter."""
        self._checks: dict[int, Callable[[fx.Node], None] | None] = {
            id(ops.end_forward): self._check_end_of_forward,
            id(ops.all_gather): self._note_start,
            id(ops.reduce_scatter): self._note_start,
            id(ops.wait): self._check_wait,
            id(ops.release): self._check_release,
            id(ops.region): self._check_region,
        }
        """What is checked beside order and reads, by the ids of operators, whose own hashes take longer."""

    def check(self) -> None:
        seen, guarded, checks = self.seen, self.guarded, self._checks
        for node in self.step.graph.nodes:
            sources, operator = torch_internals.input_nodes(node), id(node.target)
            if not seen.issuperset(sources):
                self._check_order(node)
            if operator not in checks:
                checks[operator] = self._check_of(node.target)
            check = checks[operator]
            if not guarded.isdisjoint(sources) and node.target is not ops.all_gather:
                self._check_reads(node)
            if check is not None:
                check(node)
            seen.add(node)
        self._check_nothing_in_flight("the end of the step")

    def _check_of(self, target: Any) -> Callable[[fx.Node], None] | None:
        """The check of an operator that writes into an argument, or waits for a collective of the model."""
        return self._check_write if may_write(target) or collective_name(target) == WAIT_OF_MODEL else None

    def _check_end_of_forward(self, node: fx.Node) -> None:
        self._check_nothing_in_flight("the end of forward")
        self.phase = Phase.BACKWARD

    def _note_start(self, start: fx.Node) -> None:
        self.started[start] = self.phase

    def _check_order(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in self.seen:
                raise MalformedGraphError(
                    f"{describe(node)} stands before {describe(source)}, which it reads. A pass moved it too far up."
                )

    def _check_wait(self, wait: fx.Node) -> None:
        start = started_by(wait)
        if start in self.waited:
            raise MissingWaitError(f"{describe(start)} is waited for twice. Keep one wait for each start.")
        if self.started[start] is not self.phase:
            raise PhaseError(
                f"{describe(start)} starts in forward and is waited for in backward. Wait in the same phase."
            )
        self.waited.add(start)
        for fqn, param in gathered_params(wait).items() if is_gather(wait) else ():
            values = in_memory_of(param)
            self.owner.update(dict.fromkeys(values, (start, fqn)))
            self.guarded.update(values)

    def _check_release(self, release: fx.Node) -> None:
        start = started_by(release)
        if start in self.released:
            raise DoubleReleaseError(
                f"{bucket_label(members(start))} is released twice. Keep one release for each gather."
            )
        self.released.add(start)

    def _check_reads(self, node: fx.Node) -> None:
        in_flight = sent_until(node) if model_collective(node) == WAIT_OF_MODEL else []
        for source in (*node.all_input_nodes, *in_flight):
            if source in self.shards:
                raise ReadWithoutGatherError(
                    f"{info(source).fqn} is read by {describe(node)} without a gather. Read the result of its wait."
                )
            if source not in self.owner:
                continue
            start, fqn = self.owner[source]
            if start in self.released:
                raise UseAfterReleaseError(
                    f"{fqn} is read by {describe(node)} after its release.\n"
                    "Release a parameter after its last reader, or gather it again."
                )
            if self.started[start] is not self.phase and start not in self.kept:
                raise PhaseError(
                    f"{fqn} is gathered in forward and read by {describe(node)} in backward. Gather it again."
                )

    def _check_region(self, node: fx.Node) -> None:
        """What is compiled reads its inputs without looking at them."""
        given = (*region_inputs(node), *region_places(node))
        for source, example in zip(given, region_of(node).examples, strict=True):
            if geometry(source.meta["val"]) != geometry(example):
                raise RegionInputError(
                    f"{describe(node)} is compiled for {_describe_tensor(example)} and reads {describe(source)}, which "
                    f"is {_describe_tensor(source.meta['val'])}. Run FuseCompute behind the pass that changed it."
                )

    def _check_write(self, node: fx.Node) -> None:
        """Parameters change between steps only."""
        self._check_reads(node)
        for target in written_by(node):
            memory = memory_of(target)
            if target in self.owner or role(memory) is Role.PARAM:
                fqn = self.owner[target][1] if target in self.owner else info(memory).fqn
                raise ParameterWriteError(
                    f"{describe(node)} writes into {fqn}, of which other ranks and the next gather see nothing, or "
                    "half.\nLet it write into a clone; parameters change between steps only."
                )

    def _check_nothing_in_flight(self, where: str) -> None:
        for start in self.started:
            if start not in self.waited:
                raise MissingWaitError(f"{describe(start)} is still in flight at {where}. Give it a wait.")


def _describe_tensor(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with strides {list(tensor.stride())}"


def verify_plan(step: StepGraph) -> None:
    """Check the rules of any graph, and those of a complete plan.

    Raises:
        ScheduleError: the subclass names the broken rule, and the message names the pass to run.
    """
    verify_graph(step)
    verify_complete(step)


def verify_complete(step: StepGraph) -> None:
    """Check the rules of a complete plan, beside those of any graph.

    - A parameter is read behind its gather, never from its shard.
    - Each gradient is reduced; under no_sync() it is written to its slot instead.
    - A graph with releases has one for each gather, except for buckets that stay until the shards change. A graph
      without any release holds every bucket to the end of its phase.

    Raises:
        ScheduleError: the subclass names the broken rule, and the message names the pass to run.
    """
    for fqn, param in step.param_nodes().items():
        for reader in param.users:
            if role(reader) is not Role.ALL_GATHER:
                raise ReadWithoutGatherError(
                    f"{fqn} is read by {describe(reader)} from its shard: nothing gathers it. Run InsertAllGathers."
                )
    if step.synchronize:
        done, rule = {fqn for start in step.nodes(Role.REDUCE_SCATTER) for fqn in members(start)}, "reduced"
    else:
        done, rule = {grad_fqn(slot) for slot in step.nodes(Role.WRITE_GRAD)}, "written to its slot"
    for fqn in step.grads:
        if fqn not in done:
            raise GradientReduceError(f"The gradient of {fqn} is never {rule}. Run InsertReduceScatters.")
    released = {id(node.args[0]) for node in step.nodes(Role.RELEASE)}
    for wait in step.nodes(Role.WAIT) if released else []:
        if is_gather(wait) and id(wait) not in released and members(wait) not in step.resident:
            raise MissingReleaseError(
                f"{bucket_label(members(wait))} is gathered and never released. Run ReleaseParams last."
            )


def _check_written_and_reduced_once(step: StepGraph) -> None:
    written = [grad_fqn(slot) for slot in step.nodes(Role.WRITE_GRAD)]
    reduced = [fqn for start in step.nodes(Role.REDUCE_SCATTER) for fqn in members(start)]
    for fqns, done, word in ((written, "written", "write_grad"), (reduced, "reduced", "reduce_scatter")):
        for fqn, times in Counter(fqns).items():
            if times > 1:
                raise GradientReduceError(f"The gradient of {fqn} is {done} twice. Keep one {word}.")


def _check_gradient_memory(step: StepGraph) -> None:
    """A write_grad takes the value that was computed in its slot, and nothing uses the slot afterwards."""
    slots = {grad_fqn(slot): slot for slot in step.nodes(Role.WRITE_GRAD)}
    for fqn, slot in slots.items():
        grad, memory = grad_of(slot), written_in_place(slot)
        if grad is not None and memory is not None and (slot_fqn(memory) != fqn or memory_of(grad) is not memory):
            raise GradientMemoryError(
                f"{describe(slot)} takes what was not computed in its own slot. Let it take what was, or copy."
            )
    for memory in step.nodes(Role.GRAD_SLOT):
        fqn = slot_fqn(memory)
        slot = slots.get(fqn)
        if slot is None or written_in_place(slot) is not memory:
            raise GradientMemoryError(
                f"A grad_slot has the memory of the gradient of {fqn} before that is there: its write_grad takes "
                "another value. Let write_grad take what is computed in the slot."
            )
        values = in_memory_of(memory)
        for user in (user for value in values for user in value.users):
            is_alias = user in values and not written_by(user)
            if slot < user and not is_alias:
                raise GradientMemoryError(
                    f"{describe(user)} uses the memory of the gradient of {fqn} after its write_grad, when its reduce "
                    "may be reading it.\nMove it before the write_grad, or let it use a copy."
                )


def _check_buckets(step: StepGraph) -> None:
    """Buckets are uniform and disjoint, and have equal members in every phase and for both collectives."""
    bucket_of: dict[str, tuple[str, ...]] = {}
    for start in step.nodes(Role.ALL_GATHER):
        bucket = members(start)
        if bucket_of.get(bucket[0]) == bucket:
            continue
        if len({step.params[fqn].bucket_key for fqn in bucket}) > 1:
            raise BucketError(f"The bucket {bucket_label(bucket)} mixes dtypes, or frozen with trained parameters.")
        for fqn in bucket:
            if bucket_of.setdefault(fqn, bucket) is not bucket:
                raise BucketError(f"{fqn} is gathered in two different buckets. Keep the members the same everywhere.")
    starts = step.nodes(Role.REDUCE_SCATTER)
    bucketed = any(len(members(start)) > 1 for start in starts)
    for start in starts if bucketed else []:
        bucket = members(start)
        gathered = bucket_of.get(bucket[0], bucket)
        if gathered != bucket:
            raise GradientReduceError(
                f"The reduce_scatter of {bucket_label(bucket)} has other members than the all_gather of "
                f"{bucket_label(gathered)}. Reduce the buckets of the gathers."
            )


def _check_wire_formats(step: StepGraph) -> None:
    """A wire format casts or quantises floating elements, saves bytes, and can be undone."""
    for start in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER):
        format = wire_format(start)
        if format is None:
            continue
        payload, interleaved = step.payload_of(start), step.bucket_of(start).interleaved
        is_quantised = format.block_numel is not None
        refusals = {
            "a rank that is alone has no wire": step.sharding.shard_ranks == 1,
            f"its bucket is of {payload.dtype}, which is not floating": not payload.dtype.is_floating_point,
            "floating types are cast, others quantised in blocks": format.dtype.is_floating_point == is_quantised,
            "sums need a floating type": is_quantised and not is_gather(start),
            "an interleaved layout cannot be quantised: its blocks would cross parameters": is_quantised
            and interleaved,
            f"that takes no fewer bytes than {payload.dtype}": step.travels(start).nbytes >= payload.nbytes,
        }
        for why, holds in refusals.items():
            if holds:
                raise WireFormatError(f"{describe(start)} travels as {format}, but {why}.")


def _check_inside_gathers(step: StepGraph) -> None:
    """A gather of secondary shards comes after a gather across nodes, which had an equal wire format."""
    left: dict[tuple[str, ...], WireFormat | None] = {}
    for start in step.nodes(Role.ALL_GATHER):
        bucket, format = members(start), wire_format(start)
        why = ""
        if not is_inside(start):
            left[bucket] = format
        elif not step.sharding.shards_across:
            why = "all gathers do: nodes share no shards"
        elif bucket not in left:
            why = "no gather before it has crossed nodes"
        elif left[bucket] != format:
            why = f"what crossed nodes before travelled as {left[bucket] or step.payload_of(start).dtype}"
        if why:
            raise InsideGatherError(f"{describe(start)} is to stay inside the node, but {why}.")


def collectives(step: StepGraph) -> list[str]:
    """A line for each collective, in order. Ranks have equal lines if and only if order, buckets and formats agree.

    A collective of the model's own is named with its module: its group and its shape may differ between ranks.
    """
    return [
        f"{name} of {info(node).fqn or 'the model'}" if (name := model_collective(node)) else _collective(node)
        for node in step.graph.nodes
        if role(node) in (Role.ALL_GATHER, Role.REDUCE_SCATTER) or model_collective(node) not in ("", WAIT_OF_MODEL)
    ]


def _collective(start: fx.Node) -> str:
    format = "" if wire_format(start) is None else f" as {wire_format(start)}"
    return f"{role(start).value} {','.join(members(start))}{format}" + " inside" * is_inside(start)
