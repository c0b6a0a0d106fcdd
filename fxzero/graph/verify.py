"""Prove a schedule safe, before the first pass and after each: nothing here is hoped for.

Two levels: rules of any graph (`verify_graph`), and rules of a complete plan (`verify_plan`): each gradient reduced
once, everything waited for and released.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

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
    UseAfterReleaseError,
    WireFormatError,
)
from fxzero.graph.aliasing import in_memory_of, memory_of, written_by
from fxzero.graph.names import bucket_label, describe
from fxzero.graph.nodes import (
    WAIT_OF_MODEL,
    Role,
    gathered_params,
    grad_fqn,
    grad_of,
    info,
    is_gather,
    is_inside,
    members,
    model_collective,
    operands,
    role,
    sent_until,
    slot_fqn,
    started_by,
    wire_format,
    written_in_place,
)
from fxzero.graph.step import Phase, StepGraph
from fxzero.graph.wire import WireFormat


@dataclass
class _Walk:
    """What is known after the nodes walked so far."""

    phase: Phase = Phase.FORWARD
    has_gathers: bool = False
    kept: frozenset[tuple[str, ...]] = frozenset()
    params: frozenset[fx.Node] = frozenset()
    seen: set[fx.Node] = field(default_factory=set[fx.Node])
    waited: dict[fx.Node, Phase] = field(default_factory=dict[fx.Node, Phase])
    started: dict[fx.Node, Phase] = field(default_factory=dict[fx.Node, Phase])
    released: set[fx.Node] = field(default_factory=set[fx.Node])
    owner: dict[fx.Node, tuple[fx.Node, str]] = field(default_factory=dict[fx.Node, "tuple[fx.Node, str]"])
    """The gathered bucket (its start) and the parameter that a node's memory belongs to."""


def verify_graph(step: StepGraph) -> None:
    """Check the rules of any graph, complete or not.

    Raises:
        ScheduleError: the subclass names the rule that is broken.
    """
    _check_buckets(step)
    _check_wire_formats(step)
    _check_inside_gathers(step)
    has_gathers, params = bool(step.nodes(Role.ALL_GATHER)), frozenset(step.param_nodes().values())
    walk = _Walk(has_gathers=has_gathers, kept=frozenset(step.kept), params=params)
    for node in step.graph.nodes:
        sources, kind = node.all_input_nodes, role(node)
        _check_order(walk, node, sources)
        if kind is Role.END_FORWARD:
            _check_nothing_in_flight(walk, "the end of forward")
            walk.phase = Phase.BACKWARD
        elif kind in (Role.ALL_GATHER, Role.REDUCE_SCATTER):
            walk.started[node] = walk.phase
        elif kind is Role.WAIT:
            _check_wait(walk, node)
        elif kind is Role.RELEASE:
            _check_release(walk, node)
        else:
            _check_reads(walk, node, sources)
            _check_writes(walk, node)
        walk.seen.add(node)
    _check_nothing_in_flight(walk, "the end of the step")
    _check_reduced_at_most_once(step)
    _check_gradient_memory(step)


def verify_plan(step: StepGraph) -> None:
    """Check the rules of a complete plan, beside those of any graph.

    - A parameter is read behind a gather of it, never from its shard.
    - Each gradient is reduced; under no_sync() it is written to its slot instead.
    - A graph with releases has one for each gather, but for the buckets that stay until the shards change. A graph
      without any release holds every bucket to the end of its phase.

    Raises:
        ScheduleError: the subclass names the rule that is broken, and the pass to run.
    """
    verify_graph(step)
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


def _check_order(walk: _Walk, node: fx.Node, sources: list[fx.Node]) -> None:
    for source in sources:
        if source not in walk.seen:
            raise MalformedGraphError(
                f"{describe(node)} stands before {describe(source)}, which it reads. A pass moved it too far up."
            )


def _check_wait(walk: _Walk, wait: fx.Node) -> None:
    start = started_by(wait)
    if start in walk.waited:
        raise MissingWaitError(f"{describe(start)} is waited for twice. Keep one wait for each start.")
    if walk.started[start] is not walk.phase:
        raise PhaseError(f"{describe(start)} starts in forward and is waited for in backward. Wait in the same phase.")
    walk.waited[start] = walk.phase
    if is_gather(wait):
        for fqn, param in gathered_params(wait).items():
            walk.owner.update({alias: (start, fqn) for alias in in_memory_of(param)})


def _check_release(walk: _Walk, release: fx.Node) -> None:
    start = started_by(release)
    if start in walk.released:
        raise DoubleReleaseError(f"{bucket_label(members(start))} is released twice. Keep one release for each gather.")
    walk.released.add(start)


def _check_reads(walk: _Walk, node: fx.Node, sources: list[fx.Node]) -> None:
    in_flight = sent_until(node) if model_collective(node) == WAIT_OF_MODEL else []
    for source in (*sources, *in_flight):
        if walk.has_gathers and source in walk.params:
            raise ReadWithoutGatherError(
                f"{info(source).fqn} is read by {describe(node)} without a gather. Read the result of its wait."
            )
        if source not in walk.owner:
            continue
        start, fqn = walk.owner[source]
        if start in walk.released:
            raise UseAfterReleaseError(
                f"{fqn} is read by {describe(node)} after its release.\n"
                "Release a parameter after its last reader, or gather it again."
            )
        if walk.started[start] is not walk.phase and members(start) not in walk.kept:
            raise PhaseError(f"{fqn} is gathered in forward and read by {describe(node)} in backward. Gather it again.")


def _check_writes(walk: _Walk, node: fx.Node) -> None:
    """Parameters change between steps only."""
    for target in written_by(node):
        memory = memory_of(target)
        if target in walk.owner or role(memory) is Role.PARAM:
            fqn = walk.owner[target][1] if target in walk.owner else info(memory).fqn
            raise ParameterWriteError(
                f"{describe(node)} writes into {fqn}, of which other ranks and the next gather see nothing, or half.\n"
                "Let it write into a clone; parameters change between steps only."
            )


def _check_nothing_in_flight(walk: _Walk, where: str) -> None:
    for start in walk.started:
        if start not in walk.waited:
            raise MissingWaitError(f"{describe(start)} is still in flight at {where}. Give it a wait.")


def _check_reduced_at_most_once(step: StepGraph) -> None:
    reduced: dict[str, fx.Node] = {}
    written: set[str] = set()
    for slot in step.nodes(Role.WRITE_GRAD):
        if grad_fqn(slot) in written:
            raise GradientReduceError(f"The gradient of {grad_fqn(slot)} is written twice. Keep one write_grad.")
        written.add(grad_fqn(slot))
    for start in step.nodes(Role.REDUCE_SCATTER):
        for slot in operands(start):
            fqn = grad_fqn(slot)
            if fqn in reduced:
                raise GradientReduceError(f"The gradient of {fqn} is reduced twice. Keep one reduce_scatter.")
            reduced[fqn] = start


def _check_gradient_memory(step: StepGraph) -> None:
    """What is computed in a slot is what its write_grad takes, and nothing uses the slot from there on."""
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
    """Buckets are uniform, the same in every phase and for both collectives, and disjoint."""
    bucket_of: dict[str, tuple[str, ...]] = {}
    for start in step.nodes(Role.ALL_GATHER):
        bucket = members(start)
        if len({step.params[fqn].bucket_key for fqn in bucket}) > 1:
            raise BucketError(f"The bucket {bucket_label(bucket)} mixes dtypes, or frozen with trained parameters.")
        for fqn in bucket:
            if bucket_of.setdefault(fqn, bucket) != bucket:
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
    """What travels in another type is floating, gets narrower by it, and can be brought back."""
    for start in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER):
        format = wire_format(start)
        if format is None:
            continue
        payload = step.payload_of(start)
        if step.sharding.shard_ranks == 1:
            why = "a rank that is alone has no wire"
        elif not payload.dtype.is_floating_point:
            why = f"its bucket is of {payload.dtype}, which is not floating"
        elif format.dtype.is_floating_point != (format.block_numel is None):
            why = "floating types are cast, others quantised in blocks"
        elif format.block_numel is not None and not is_gather(start):
            why = "sums need a floating type"
        elif format.block_numel is not None and step.bucket_of(start).interleaved:
            why = "an interleaved layout cannot be quantised: its blocks would cross parameters"
        elif step.travels(start).nbytes >= payload.nbytes:
            why = f"that takes no fewer bytes than {payload.dtype}"
        else:
            continue
        raise WireFormatError(f"{describe(start)} travels as {format}, but {why}.")


def _check_inside_gathers(step: StepGraph) -> None:
    """What is gathered from secondary shards was gathered across nodes before, in the same type."""
    left: dict[tuple[str, ...], WireFormat | None] = {}
    for start in step.nodes(Role.ALL_GATHER):
        if not is_inside(start):
            left[members(start)] = wire_format(start)
            continue
        if not step.sharding.shards_across:
            why = "all gathers do: nodes share no shards"
        elif members(start) not in left:
            why = "no gather before it has crossed nodes"
        elif left[members(start)] != wire_format(start):
            why = f"what crossed nodes before travelled as {left[members(start)] or step.payload_of(start).dtype}"
        else:
            continue
        raise InsideGatherError(f"{describe(start)} is to stay inside the node, but {why}.")


def collectives(step: StepGraph) -> list[str]:
    """The order of collectives, as text equal on two ranks exactly if the order, the buckets and the formats are.

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
