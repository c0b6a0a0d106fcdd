"""Which events order the compute and the communication stream of a GPU: no more waits than the schedule needs.

    compute   mm0 . . . mm1 . . . . mm2          queue order: each stream runs its own operations one after another
                 \\      ^  \\                    mm0 -> gather: it overwrites what mm0 read
    comm       gather0 --'   `-> reduce1         gather0 -> mm1: mm1 reads it

An edge between the queues becomes one event: recorded after its first end, waited for before its second. The edges kept
are those of the transitive reduction of "queue order and requirements": each collective waits for events of exactly its
inputs, compute waits for exactly that collective, and nothing waits for what another wait implies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import networkx as nx
from torch import fx

from fxzero.errors import ScheduleError
from fxzero.graph.aliasing import is_view
from fxzero.graph.nodes import Role, gathered_params, is_gather, operands, role, wait_of, wire_format
from fxzero.graph.step import StepGraph

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
    return accumulate or wire_format(collective) is not None


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


class CudaStreams:
    """The events of a plan, as functions without arguments for the generated code to call.

    A collective is started with the communication stream current, whose events it then waits for; `work.wait()`, with
    the compute stream current, makes that stream wait for exactly that collective, so an edge from a collective needs
    no event of ours. The compute stream is whatever stream is current when the step runs.

    Args:
        cuda: `torch.cuda`, or what looks like it (Event, Stream, stream).
    """

    def __init__(self, queues: Sequence[Queue], edges: Iterable[EventEdge], cuda: Any, device: Any = None) -> None:
        self._cuda = cuda
        self.stream = cuda.Stream(device=device)
        """The communication stream: one for all plans would do, as its order is that of the schedule."""
        self._started = {op for queue in queues if queue.name == COMMUNICATION for op in queue.ops}
        self._waits: dict[int, list[int]] = {}
        self._events: dict[int, Any] = {}
        for edge in sorted(edges):
            self._waits.setdefault(edge.after, []).append(edge.before)
            if edge.before not in self._started:
                self._events[edge.before] = self._events.get(edge.before) or cuda.Event()

    def before(self, op: int, waits: Mapping[int, Callable[[], object]]) -> list[Callable[[], object]]:
        """What to call before a compute operation: the waits of the collectives it needs, from `waits` by start.

        Each wait is called at most once in a step, and not at all where the wait of a later collective implies it; so
        the wait of an accumulating reduce-scatter, which also adds, has to be called at its own place instead.
        """
        return [waits[start] for start in self._waits.get(op, [])]

    def after(self, op: int) -> list[Callable[[], object]]:
        """What to call after a compute operation: record its event, if a collective waits for it.

        For BEGIN and the end of forward: when the forward, and the backward, begins.
        """
        return [self._events[op].record] if op in self._events else []

    def start(
        self, op: int, start: Callable[[], object], copies: Callable[[], object] | None = None
    ) -> Callable[[], object]:
        """The start of a collective: on the communication stream, after the events of its inputs.

        Args:
            copies: what makes its input just before, on the compute stream: one more event.
        """
        waits: list[Callable[[], object]] = []
        if copies is not None:
            copied = self._cuda.Event()
            waits = [copies, copied.record, partial(self.stream.wait_event, copied)]
        waits += [partial(self.stream.wait_event, self._events[before]) for before in self._waits.get(op, [])]
        on_stream, stream = self._cuda.stream, self.stream

        def start_on_stream() -> None:
            for wait in waits:
                wait()
            with on_stream(stream):
                start()

        return start_on_stream
