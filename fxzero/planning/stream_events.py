"""Which events order the compute and the communication stream of a GPU: no more waits than the schedule needs.

    compute   mm0 . . . mm1 . . . . mm2          queue order: each stream runs its own operations one after another
                 \\      ^  \\                    mm0 -> gather: it overwrites what mm0 read
    comm       gather0 --'   `-> reduce1         gather0 -> mm1: mm1 reads it

An edge between the queues becomes one event: recorded after its first end, waited for before its second. The edges kept
are those of the transitive reduction of "queue order and requirements": each collective waits for events of exactly its
inputs, compute waits for exactly that collective, and nothing waits for what another wait implies.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxzero.comm.wire_copies import casts
from fxzero.errors import ScheduleError
from fxzero.graph.aliasing import is_view
from fxzero.graph.nodes import Role, gathered_params, is_gather, is_inside, operands, role, wait_of, wire_format
from fxzero.graph.step import StepGraph
from fxzero.memory.arena_plan import Placed
from fxzero.memory.lifetimes import Kind, Writer

COMPUTE, COMMUNICATION = "compute", "communication"
BEGIN = -1
"""What came before the step on the compute queue, such as the optimizer's step."""


@dataclass(frozen=True)
class Queue:
    """Operations (any distinct numbers) that run one after another."""

    name: str
    ops: tuple[int, ...]


@dataclass(frozen=True, order=True)
class EventEdge:
    """Record an event after operation `before`; wait for it, in the other queue, before operation `after`."""

    before: int
    after: int


def plan_events(queues: Sequence[Queue], requires: Iterable[tuple[int, int]]) -> list[EventEdge]:
    """The fewest edges between queues that, with the order within queues, imply every requirement.

    Args:
        requires: pairs (before, after) of operations.

    Raises:
        ScheduleError: the requirements contradict the order of a queue, or each other.
        ValueError: a requirement names an operation of no queue.
    """
    import networkx as nx  # takes 10 MB, which runs on the CPU do not need

    requires = list(requires)
    queue_of = {op: index for index, queue in enumerate(queues) for op in queue.ops}
    named = {op for pair in requires for op in pair}
    if unknown := named - queue_of.keys():
        raise ValueError(f"operations of no queue are required: {sorted(unknown)}")
    order: nx.DiGraph[int] = nx.DiGraph(requires)
    for queue in queues:  # operations that nothing requires would only make the reduction slow
        nx.add_path(order, [op for op in queue.ops if op in named])
    if not nx.is_directed_acyclic_graph(order):
        cycle = [before for before, _ in nx.find_cycle(order)]
        raise ScheduleError(f"operations {cycle} wait for each other: a queue runs one before another that it requires")
    reduced = nx.transitive_reduction(order)
    return sorted(EventEdge(u, v) for u, v in reduced.edges if queue_of[u] != queue_of[v])


def queues_of(step: StepGraph, *, accumulate: bool = False) -> list[Queue]:
    """The two queues of a final schedule; operations are positions in the graph, and BEGIN.

    Both phase ends are on the compute queue. With `accumulate`, so are the waits of reduce-scatters, which add to the
    gradient shards, and always those of what travels in another type; else they are no work. So are the waits of staged
    gathers, which copy; else they are no work. Views and releases never are.
    """
    compute, communication = [BEGIN], list[int]()
    for op, node in enumerate(step.graph.nodes):
        if role(node) in (Role.ALL_GATHER, Role.REDUCE_SCATTER):
            communication.append(op)
        elif role(node) is Role.WAIT:
            compute += [op] if works_at_wait(step, node, accumulate=accumulate) else []
        elif _computes(node) or role(node) in (Role.END_FORWARD, Role.OUTPUT):
            compute.append(op)
    return [Queue(COMPUTE, tuple(compute)), Queue(COMMUNICATION, tuple(communication))]


def requirements(
    step: StepGraph, occupied: Mapping[fx.Node, Sequence[fx.Node]], *, accumulate: bool = False
) -> set[tuple[int, int]]:
    """What must be done before what, as pairs of operations of `queues_of` in different queues.

    - the first collective of a phase: everything before the phase, which wrote the shards;
    - a reduce_scatter: the writes of its gradients, if they are not copied just before it;
    - a reader of a gathered parameter, through any views, and what copies it at the wait: its all_gather;
    - the end of each phase: all its collectives; the wait of a reduce_scatter that adds or converts: its start;
    - a node that writes bytes of an arena which others have used: these.

    Args:
        occupied: for a start, a write_grad or a compute node, the nodes that must be done before it may write.
    """
    at = step.positions()
    pairs: set[tuple[int, int]] = set()
    begin = BEGIN
    for _, nodes in step.phases():
        starts = [node for node in nodes if role(node) in (Role.ALL_GATHER, Role.REDUCE_SCATTER)]
        boundary = step.end_forward if begin == BEGIN else None
        end = at[boundary or step.output]
        if starts:
            pairs.add((begin, at[starts[0]]))
        for start in starts:
            pairs.add((at[start], end))
            if is_gather(start):
                pairs.update((at[start], at[reader]) for reader in readers_of(start))
            elif not step.is_staged(start):  # else its copies have an event of their own
                pairs.update((at[slot], at[start]) for slot in operands(start))
            if works_at_wait(step, start, accumulate=accumulate):
                pairs.add((at[start], at[wait_of(start)]))
        begin = end
    pairs |= {(at[earlier], at[node]) for node, before in occupied.items() for earlier in before}
    queue_of = {op: queue.name for queue in queues_of(step, accumulate=accumulate) for op in queue.ops}
    return {
        (before, after)
        for before, after in pairs
        if before > after or queue_of.get(before, before) != queue_of.get(after, after)
    }


def _computes(node: fx.Node) -> bool:
    """True for a node that puts work on the compute stream."""
    if role(node) is Role.WRITE_GRAD:
        return True
    return role(node) is Role.COMPUTE and node.target is not operator.getitem and not is_view(node)


def works_at_wait(step: StepGraph, collective: fx.Node, *, accumulate: bool) -> bool:
    """True for a collective whose wait puts work on the compute stream behind it."""
    if is_gather(collective):
        return step.is_staged(collective)
    return accumulate or casts(step.bucket_of(collective), wire_format(collective))


def readers_of(start: fx.Node) -> list[fx.Node]:
    """The compute nodes that read what an all_gather gathers, through any views."""
    return [reader for param in gathered_params(wait_of(start)).values() for reader in _readers(param)]


def _readers(value: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a tensor's memory: itself or any view of it."""
    for user in value.users:
        if _computes(user) or role(user) is Role.OUTPUT:
            yield user
        elif role(user) is Role.COMPUTE:
            yield from _readers(user)


def occupied_before(step: StepGraph, placed: Placed, *, accumulate: bool) -> dict[fx.Node, list[fx.Node]]:
    """For each start, the compute nodes that used the bytes which its collective overwrites.

    A gather writes its bucket and a reduce-scatter its scratch, on the communication stream; compute reads gathered
    parameters, and reads scratch at the wait of a reduce-scatter that accumulates or travels in another type. A staged
    gather writes its staging buffer, from which compute copies at its wait; the bucket, and the staging buffer of a
    reduce-scatter, are written by compute, which has waited for all collectives that used their bytes. So is the rank's
    own row in the staging buffer of what travels in another type, unless it comes from secondary shards: the start
    waits for that, and so for all before it.
    """
    at = step.positions()
    before: dict[fx.Node, list[fx.Node]] = {}
    for (kind, start), (buffer, offset) in placed.items():
        if not _written_by_start(step, kind, start):
            continue
        for (other_kind, other), (earlier, other_offset) in placed.items():
            apart = offset + buffer.nbytes <= other_offset or other_offset + earlier.nbytes <= offset
            if earlier.end >= buffer.start or apart:
                continue
            if other_kind is Kind.GATHER:
                before.setdefault(start, []).extend(readers_of(other))
            is_read_at_wait = is_gather(other) or other_kind.read_at_wait
            if is_read_at_wait and works_at_wait(step, other, accumulate=accumulate):
                wait = wait_of(other)
                if at[wait] <= earlier.end:  # else only its start used them, for whose work later starts wait too
                    before.setdefault(start, []).append(wait)
    return before


def _written_by_start(step: StepGraph, kind: Kind, start: fx.Node) -> bool:
    """False for memory that compute writes first."""
    if kind is Kind.STAGING:
        return is_gather(start) and (wire_format(start) is None or is_inside(start))
    if kind is Kind.GATHER and step.is_staged(start):
        return False
    return kind.written_by is Writer.COLLECTIVE


@dataclass(frozen=True)
class StreamEvents:
    """The events that order the two streams of one variant of a step."""

    queues: tuple[Queue, ...]
    edges: tuple[EventEdge, ...]
    recorded: tuple[fx.Node, ...]
    """The nodes after which the compute stream records an event; end_forward stands for the begin of backward."""
    at_begin: bool
    """It records one before everything else too."""


def plan_stream_events(step: StepGraph, placed: Placed, *, accumulate: bool) -> StreamEvents:
    """Find the events that a step on two streams needs.

    Args:
        placed: where everything lies in the arena.
        accumulate: reduce-scatters add to the gradient shards at their waits.
    """
    queues = queues_of(step, accumulate=accumulate)
    occupied = occupied_before(step, placed, accumulate=accumulate)
    edges = plan_events(queues, requirements(step, occupied, accumulate=accumulate))
    started = {op for queue in queues if queue.name == COMMUNICATION for op in queue.ops}
    before = {edge.before for edge in edges} - started
    recorded = tuple(node for op, node in enumerate(step.graph.nodes) if op in before)
    return StreamEvents(tuple(queues), tuple(edges), recorded, BEGIN in before)
