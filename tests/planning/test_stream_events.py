"""Events between streams: enough, and not one too many; and the calls they become."""

import os
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxzero.comm.nccl import NcclComm
from fxzero.errors import ScheduleError
from fxzero.graph.aliasing import is_view
from fxzero.graph.nodes import Role, is_gather, members, role, started_by
from fxzero.graph.step import StepGraph
from fxzero.passes import default_passes
from fxzero.planning.run_passes import run_passes
from fxzero.planning.stream_events import BEGIN, EventEdge, Queue, plan_events, queues_of, requirements
from fxzero.runtime.cuda_streams import CudaStreams
from tests.helpers.payloads import one_payload
from tests.helpers.toy_step import toy_step


def reachable(queues: list[Queue], pairs: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """All (before, after) that queue order and pairs imply."""
    successors: dict[int, set[int]] = {op: set() for queue in queues for op in queue.ops}
    for before, after in [*pairs, *(pair for queue in queues for pair in pairwise(queue.ops))]:
        successors[before].add(after)

    def search(op: int, seen: set[int]) -> set[int]:
        for after in successors[op] - seen:
            seen.add(after)
            search(after, seen)
        return seen

    return {(op, after) for op in successors for after in search(op, set())}


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Queue], list[tuple[int, int]]]:
    """Operations in one order, each in one of a few queues, and requirements that agree with that order."""
    num_ops = draw(st.integers(1, 14))
    queue_of = draw(st.lists(st.integers(0, 2), min_size=num_ops, max_size=num_ops))
    queues = [Queue(str(q), tuple(op for op in range(num_ops) if queue_of[op] == q)) for q in range(3)]
    pair = st.tuples(st.integers(0, num_ops - 1), st.integers(0, num_ops - 1)).filter(lambda p: p[0] < p[1])
    return queues, draw(st.lists(pair, max_size=20)) if num_ops > 1 else []


@given(problems())
@settings(max_examples=200, deadline=None)
def test_kept_edges_imply_all_requirements_and_none_is_implied(problem: tuple[list[Queue], list[Any]]) -> None:
    queues, requires = problem
    edges = [(edge.before, edge.after) for edge in plan_events(queues, requires)]
    queue_of = {op: queue.name for queue in queues for op in queue.ops}
    assert all(queue_of[before] != queue_of[after] for before, after in edges)
    assert set(requires) <= reachable(queues, edges)
    assert reachable(queues, edges) == reachable(queues, requires)
    for edge in edges:
        assert edge not in reachable(queues, [other for other in edges if other != edge])


def test_a_contradiction_is_refused() -> None:
    queues = [Queue("compute", (0, 1)), Queue("communication", (2, 3))]
    with pytest.raises(ScheduleError, match="wait for each other"):
        plan_events(queues, [(1, 2), (3, 0)])
    with pytest.raises(ValueError, match=r"of no queue are required: \[7\]"):
        plan_events(queues, [(0, 7)])


def planned(num_layers: int, **options: Any) -> StepGraph:
    step = toy_step(num_layers)
    run_passes(step, default_passes(bucket_bytes=1, **options))
    return step


def names_of(step: StepGraph) -> dict[int, str]:
    names = {BEGIN: "begin"}
    for op, node in enumerate(step.graph.nodes):
        is_collective = role(node) in (Role.ALL_GATHER, Role.REDUCE_SCATTER, Role.WAIT)
        names[op] = f"{role(node).value} {members(started_by(node))[0]}" if is_collective else node.name
    return names


def occupants(step: StepGraph) -> dict[fx.Node, list[fx.Node]]:
    """As if all gathers used the same bytes: each start must follow the readers of the gather before it."""
    before: list[fx.Node] = []
    result: dict[fx.Node, list[fx.Node]] = {}
    for start in step.nodes(Role.ALL_GATHER):
        result[start] = before
        wait = next(user for user in start.users if role(user) is Role.WAIT)
        values = [user for user in wait.users if role(user) is Role.COMPUTE]
        before = []
        while values:
            node = values.pop()
            is_alias = node.target.__name__ == "getitem" or is_view(node)  # type: ignore[union-attr]
            (values if is_alias else before).extend(node.users if is_alias else [node])
    return result


def test_events_of_a_step_are_exactly_its_dependencies() -> None:
    step = planned(2, prefetch_bytes=0)
    edges = plan_events(queues_of(step), requirements(step, occupants(step)))
    names = names_of(step)
    assert_expected_inline(
        "\n".join(f"{names[edge.before]} -> {names[edge.after]}" for edge in edges),
        """\
begin -> all_gather layers.0.w
all_gather layers.0.w -> mm_default
all_gather layers.1.w -> mm_default_1
mm_default -> all_gather layers.1.w
end_forward -> all_gather layers.1.w
all_gather layers.1.w -> mm_default_3
write_grad -> reduce_scatter layers.1.w
write_grad_1 -> reduce_scatter layers.0.w
reduce_scatter layers.0.w -> output""",
    )


@pytest.mark.parametrize("accumulate", [False, True])
def test_every_reader_and_every_collective_is_ordered(accumulate: bool) -> None:
    """Checked against the graph by a walk of its own."""
    step = planned(5)
    queues = queues_of(step, accumulate=accumulate)
    edges = [(e.before, e.after) for e in plan_events(queues, requirements(step, {}, accumulate=accumulate))]
    implied = reachable(queues, edges)
    at = step.positions()
    for node in step.graph.nodes:
        if role(node) is Role.REDUCE_SCATTER:
            assert all((at[slot], at[node]) in implied for slot in node.args)
            assert (at[node], at[step.output]) in implied
        if role(node) is Role.COMPUTE and at[node] in queues[0].ops:
            for source in sources(node):
                assert (at[source], at[node]) in implied
    assert len(edges) <= 3 * len(queues[1].ops)


def sources(node: fx.Node) -> set[fx.Node]:
    """The all_gathers whose bytes a node reads, through views."""
    found: set[fx.Node] = set()
    for value in node.all_input_nodes:
        if role(value) is Role.WAIT and is_gather(value):
            found.add(started_by(value))
        elif role(value) is Role.COMPUTE and (getattr(value.target, "__name__", "") == "getitem" or is_view(value)):
            found |= sources(value)
    return found


def test_forward_only_step_has_no_boundary() -> None:
    step = toy_step(2, backward=False)
    run_passes(step, default_passes(bucket_bytes=1))
    edges = plan_events(queues_of(step), requirements(step, {}))
    assert next(edge.before for edge in edges) == BEGIN


class RecordedCuda:
    """Events, streams and the current stream of torch.cuda, writing down what is called."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "compute"
        cuda = self

        class Event:
            num = 0

            def __init__(self) -> None:
                Event.num += 1
                self.name = f"event{Event.num}"

            def record(self) -> None:
                cuda.log.append(f"record {self.name} on {cuda.current}")

        class Stream:
            def __init__(self, device: Any = None) -> None:
                pass

            def wait_event(self, event: Event) -> None:
                cuda.log.append(f"comm waits for {event.name}")

        class stream:
            def __init__(self, stream: Stream) -> None:
                pass

            def __enter__(self) -> None:
                cuda.current = "comm"

            def __exit__(self, *args: Any) -> None:
                cuda.current = "compute"

        self.Event, self.Stream, self.stream = Event, Stream, stream


def run_queues(streams: CudaStreams, queues: list[Queue], ops: list[int], do: Any, waits: dict[int, Any]) -> None:
    """What generated code does: operations in one order, with the calls of the streams around them."""
    for op in ops:
        if op in queues[1].ops:
            streams.start(op, lambda op=op: do(op))()
        else:
            for wait in streams.before(op, waits):
                wait()
            do(op)
            for record in streams.after(op):
                record()


def test_calls_come_in_order_on_their_streams() -> None:
    queues = [Queue("compute", (0, 2, 4, 6)), Queue("communication", (1, 3, 5))]
    edges = plan_events(queues, [(0, 1), (1, 4), (2, 5), (5, 6), (3, 6), (0, 5)])
    assert edges == [EventEdge(0, 1), EventEdge(1, 4), EventEdge(2, 5), EventEdge(5, 6)]
    cuda = RecordedCuda()
    waits = {op: lambda op=op: cuda.log.append(f"wait {op} on {cuda.current}") for op in queues[1].ops}
    streams = CudaStreams(queues, edges, cuda)
    run_queues(streams, queues, list(range(7)), lambda op: cuda.log.append(f"op {op} on {cuda.current}"), waits)
    assert_expected_inline(
        "\n".join(cuda.log),
        """\
op 0 on compute
record event1 on compute
comm waits for event1
op 1 on comm
op 2 on compute
record event2 on compute
op 3 on comm
wait 1 on compute
op 4 on compute
comm waits for event2
op 5 on comm
wait 5 on compute
op 6 on compute""",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_streams_order_compute_and_collectives() -> None:
    """One rank of NCCL: slow writes, gathers of what they wrote, and readers; each must see what was written."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    device = torch.device("cuda", 0)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        group = dist.group.WORLD
        assert group is not None
        comm = NcclComm(group)
        payload = one_payload(1, 1 << 20)
        shard, full, copy = (torch.zeros(payload.numel, device=device) for _ in range(3))
        start, wait = comm.bind_gather(payload, shard, full)
        assert start is not None and wait is not None
        queues = [Queue("compute", (0, 2)), Queue("communication", (1,))]
        streams = CudaStreams(queues, plan_events(queues, [(0, 1), (1, 2)]), torch.cuda, device)

        for value in range(1, 20):

            def do(op: int, value: int = value) -> None:
                if op == 0:
                    torch.cuda._sleep(10_000_000)
                    shard.fill_(value)
                elif op == 1:
                    start()
                else:
                    copy.copy_(full)

            run_queues(streams, queues, [0, 1, 2], do, {1: wait})
            assert copy.eq(value).all()
    finally:
        dist.destroy_process_group()
