"""On two streams, every conflicting pair of accesses to the arena is ordered by the events that the code records.

A fake `torch.cuda` keeps a vector clock per stream: an event holds the clock of the stream that recorded it, and a
stream that waits for an event knows all that the event knew. Each access is checked against all earlier ones.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pytest
import torch
from torch import fx

from fxzero.comm.nccl import NCCL
from fxzero.graph.layout import LayoutName
from fxzero.graph.nodes import Role, first_write, is_gather, is_inside, operands, role, started_by, wire_format
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import StepGraph
from fxzero.memory.activations import activations_of
from fxzero.memory.arena_plan import Placed, plan_arenas
from fxzero.memory.lifetimes import Kind
from fxzero.passes import default_passes
from fxzero.planning.codegen import generate
from fxzero.planning.run_passes import run_passes
from fxzero.planning.stream_events import plan_stream_events, readers_of
from fxzero.runtime.cuda_streams import Events, bind_events
from tests.helpers.toy_step import toy_step

COMPUTE, COMMUNICATION = "compute", "communication"


@dataclass
class Clocks:
    """What each stream knows of the operations of all streams, and a `torch.cuda` that keeps it."""

    known: dict[str, dict[str, int]] = field(default_factory=lambda: {COMPUTE: {}, COMMUNICATION: {}})
    current: str = COMPUTE

    def tick(self, stream: str) -> tuple[str, int]:
        """Run one operation on a stream: its name in the clocks."""
        self.known[stream][stream] = self.known[stream].get(stream, 0) + 1
        return stream, self.known[stream][stream]

    def learn(self, stream: str, clock: dict[str, int]) -> None:
        for name, time in clock.items():
            self.known[stream][name] = max(self.known[stream].get(name, 0), time)

    def knows(self, stream: str, operation: tuple[str, int]) -> bool:
        return self.known[stream].get(operation[0], 0) >= operation[1]

    def cuda(self) -> Any:
        clocks = self

        class Event:
            def record(self) -> None:
                self.clock = dict(clocks.known[clocks.current])

        class Stream:
            def __init__(self, device: Any = None) -> None:
                pass

            def wait_event(self, event: Event) -> None:
                clocks.learn(COMMUNICATION, event.clock)

        class stream:
            def __init__(self, which: Stream) -> None:
                pass

            def __enter__(self) -> None:
                clocks.current = COMMUNICATION

            def __exit__(self, *args: object) -> None:
                clocks.current = COMPUTE

        class Cuda:
            pass

        Cuda.Event, Cuda.Stream, Cuda.stream = Event, Stream, stream  # type: ignore[attr-defined]
        return Cuda


@dataclass
class Access:
    operation: tuple[str, int]
    begin: int
    end: int
    writes: bool
    what: str


@dataclass
class Simulation:
    """Walks a schedule in order and checks each access to the arena when it happens."""

    step: StepGraph
    placed: Placed
    events: Events
    clocks: Clocks
    accumulate: bool
    accesses: list[Access] = field(default_factory=list[Access])
    done: dict[fx.Node, dict[str, int]] = field(default_factory=dict[fx.Node, "dict[str, int]"])
    conflicts: int = 0

    def run(self) -> None:
        reads: dict[fx.Node, list[fx.Node]] = {}
        for start in self.step.nodes(Role.ALL_GATHER):
            for reader in readers_of(start):
                reads.setdefault(reader, []).append(start)
        writes: dict[fx.Node, list[fx.Node]] = {}
        for start in self.step.nodes(Role.REDUCE_SCATTER):
            for slot in operands(start):
                writes.setdefault(first_write(slot), []).append(start)
                writes.setdefault(slot, []).append(start)
        if self.events.begin is not None:
            self.events.begin()
        for node in self.step.graph.nodes:
            if role(node) in (Role.ALL_GATHER, Role.REDUCE_SCATTER):
                self.start(node)
            elif role(node) is Role.WAIT:
                self.clocks.learn(COMPUTE, self.done[started_by(node)])
                if is_gather(node) and self.step.is_staged(node):
                    operation = self.clocks.tick(COMPUTE)
                    self.touch(operation, Kind.STAGING, started_by(node), writes=False, node=node)
                    self.touch(operation, Kind.GATHER, started_by(node), writes=True, node=node)
                    if self.step.payload_of(node).dtype is not torch.float32:
                        self.touch(operation, Kind.QUANTIZE, started_by(node), writes=True, node=node)
                if not is_gather(node) and (self.accumulate or wire_format(node) is not None):
                    operation = self.clocks.tick(COMPUTE)
                    self.touch(operation, Kind.SCRATCH, started_by(node), writes=False, node=node)
            else:
                operation = self.clocks.tick(COMPUTE)
                for start in reads.get(node, []):
                    self.touch(operation, Kind.GATHER, start, writes=False, node=node)
                for start in writes.get(node, []):
                    self.touch(operation, Kind.GRADIENT, start, writes=True, node=node)
            if record := self.events.recorded.get(node):
                record()

    def start(self, node: fx.Node) -> None:
        def collective() -> None:
            assert self.clocks.current == COMMUNICATION
            operation = self.clocks.tick(COMMUNICATION)
            if is_gather(node):
                self.touch(operation, Kind.STAGING if staged else Kind.GATHER, node, writes=True, node=node)
            else:
                self.touch(operation, Kind.STAGING if staged else Kind.GRADIENT, node, writes=False, node=node)
                self.touch(operation, Kind.SCRATCH, node, writes=True, node=node)
            self.done[node] = dict(self.clocks.known[COMMUNICATION])

        def copies() -> None:
            assert self.clocks.current == COMPUTE
            operation = self.clocks.tick(COMPUTE)
            self.touch(
                operation, Kind.QUANTIZE if is_gather(node) else Kind.GRADIENT, node, writes=is_gather(node), node=node
            )
            self.touch(operation, Kind.STAGING, node, writes=True, node=node)

        staged = self.step.is_staged(node)
        sends_copy = staged and not (is_gather(node) and (wire_format(node) is None or is_inside(node)))
        self.events.start(node, collective, copies if sends_copy else None)()

    def touch(self, operation: tuple[str, int], kind: Kind, start: fx.Node, *, writes: bool, node: fx.Node) -> None:
        if (kind, start) not in self.placed:
            return
        buffer, offset = self.placed[kind, start]
        access = Access(operation, offset, offset + buffer.nbytes, writes, f"{node.name} ({kind.value} {buffer.name})")
        for earlier in self.accesses:
            overlap = earlier.begin < access.end and access.begin < earlier.end
            if overlap and (earlier.writes or writes) and earlier.operation[0] != operation[0]:
                self.conflicts += 1
                assert self.clocks.knows(operation[0], earlier.operation), f"{access.what} races with {earlier.what}"
        self.accesses.append(access)


def simulate(
    accumulate: bool,
    drop: Callable[[Events], None] | None = None,
    layout: LayoutName = "contiguous",
    dtypes: dict[str, Any] | None = None,
    narrowed: int = -1,
    param_dtype: torch.dtype = torch.float32,
    num_nodes: int = 1,
    frozen: int = -1,
) -> Simulation:
    """Walk a schedule.

    Args:
        dtypes: of the wire, as of `default_passes`.
        narrowed: of the collectives only those in a narrower type whose number is a multiple of this.
        num_nodes: that share the shards, if there are several.
    """
    step = toy_step(num_layers=6, world_size=4, frozen=frozen)
    step.sharding = Sharding.over(4, num_nodes, "shard")
    step.layout = layout
    step.params = {fqn: replace(param, dtype=param_dtype) for fqn, param in step.params.items()}
    run_passes(step, default_passes(bucket_bytes=2**14, prefetch_bytes=2**15, reduce_bytes=2**15, **(dtypes or {})))
    for index, start in enumerate(step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER)):
        if index % narrowed:
            start.kwargs = {}
    placed = plan_arenas(step, NCCL, activations_of(step))[accumulate].placed
    clocks = Clocks()
    planned = plan_stream_events(step, placed, accumulate=accumulate)
    events = bind_events(step, planned, clocks.cuda(), None)
    if drop is not None:
        drop(events)
    simulation = Simulation(step, placed, events, clocks, accumulate)
    simulation.run()
    return simulation


@pytest.mark.parametrize("layout", get_args(LayoutName))
@pytest.mark.parametrize("accumulate", [False, True])
def test_conflicting_accesses_are_ordered_when_buffers_share_bytes(accumulate: bool, layout: LayoutName) -> None:
    assert simulate(accumulate, layout=layout).conflicts > 20


@pytest.mark.parametrize("narrowed", [1, 2, 3])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gather_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("accumulate", [False, True])
def test_conflicting_accesses_are_ordered_when_some_collectives_are_narrow(
    accumulate: bool, gather_dtype: torch.dtype, param_dtype: torch.dtype, narrowed: int
) -> None:
    dtypes = {"gather_dtype": gather_dtype, "reduce_dtype": torch.bfloat16}
    assert simulate(accumulate, dtypes=dtypes, narrowed=narrowed, param_dtype=param_dtype).conflicts > 20


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "interleaved"}, *({"dtypes": {"gather_dtype": dtype}} for dtype in (torch.bfloat16, torch.int8))],
)
@pytest.mark.parametrize("frozen", [-1, 3])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("accumulate", [False, True])
def test_conflicting_accesses_are_ordered_when_nodes_share_shards(
    accumulate: bool, param_dtype: torch.dtype, frozen: int, options: dict[str, Any]
) -> None:
    simulation = simulate(accumulate, param_dtype=param_dtype, num_nodes=2, frozen=frozen, **options)
    assert simulation.conflicts > 20
    assert any(is_inside(start) for start in simulation.step.nodes(Role.ALL_GATHER))


@pytest.mark.parametrize("layout", get_args(LayoutName))
def test_missing_event_is_noticed(layout: LayoutName) -> None:
    def forget_one(events: Events) -> None:
        waits = events.streams._waits
        start = next(
            op for op, before in waits.items() if any(op_ in events.streams._events for op_ in before) and op > 12
        )
        waits[start] = []

    with pytest.raises(AssertionError, match="races with"):
        simulate(False, forget_one, layout)


@pytest.mark.parametrize(
    "options",
    [{"layout": "interleaved"}, {"dtypes": {"gather_dtype": torch.int8}}, {"dtypes": {"reduce_dtype": torch.bfloat16}}],
    ids=["interleaved", "gather", "reduce"],
)
def test_collective_that_does_not_wait_for_its_copies_is_noticed(options: dict[str, Any]) -> None:
    def forget_copies(events: Events) -> None:
        start = events.streams.start

        def hasty(op: int, collective: Callable[[], object], copies: Any = None) -> Callable[[], object]:
            bare = start(op, collective)
            return bare if copies is None else lambda: (copies(), bare())

        events.streams.start = hasty  # type: ignore[method-assign]

    with pytest.raises(AssertionError, match="races with"):
        simulate(False, forget_copies, **options)


def test_code_records_each_event_after_its_node() -> None:
    simulation = simulate(False)
    code = generate(simulation.step, {}, simulation.events.recorded, record_begin=True)
    calls = [
        node.value.func.id
        for function in ast.parse(code.source).body
        for node in function.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
    ]
    assert calls[0] == "record_begin"
    assert [name for name in calls[1:] if name.startswith("record_")] == [
        f"record_{node.name}" for node in simulation.step.graph.nodes if node in simulation.events.recorded
    ]
