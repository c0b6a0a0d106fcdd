"""The events of a plan on two CUDA streams, as functions for the generated code to call."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from fxzero.graph.step import StepGraph
from fxzero.planning.stream_events import BEGIN, COMMUNICATION, EventEdge, Queue, StreamEvents


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

    def fork(self) -> None:
        """Let the communication stream come behind what the current one has so far: a capture takes it along then."""
        event = self._cuda.Event()
        event.record()
        self.stream.wait_event(event)

    def join(self) -> None:
        """Let the current stream come behind all that the communication stream has so far: the end of a capture."""
        event = self._cuda.Event()
        with self._cuda.stream(self.stream):
            event.record()
        self._cuda.current_stream().wait_event(event)

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


@dataclass(frozen=True)
class Events:
    """The events of one binding of a plan."""

    streams: CudaStreams
    recorded: dict[fx.Node, Callable[[], object]]
    """What to call after a node."""
    begin: Callable[[], object] | None
    """What to call before everything else."""
    positions: Mapping[fx.Node, int]

    def start(
        self, node: fx.Node, start: Callable[[], object], copies: Callable[[], object] | None = None
    ) -> Callable[[], object]:
        """The start of a collective, after the events of its inputs and on the communication stream.

        Args:
            copies: what makes its input just before, on the compute stream.
        """
        return self.streams.start(self.positions[node], start, copies)


def bind_events(step: StepGraph, planned: StreamEvents, cuda: Any, device: Any) -> Events:
    """Make the events of one variant of a step.

    Args:
        cuda: `torch.cuda`, or what looks like it.
    """
    streams = CudaStreams(planned.queues, planned.edges, cuda, device)
    at = step.positions()
    recorded = {node: record for node in planned.recorded for record in streams.after(at[node])}
    return Events(streams, recorded, next(iter(streams.after(BEGIN)), None), at)
