"""What surrounds replays: the second stream of a capture, waits that end, and the end of process groups."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fxzero.comm.phases import PhaseLog, Stop
from fxzero.errors import CommunicationError
from fxzero.planning.stream_events import EventEdge, Queue
from fxzero.runtime.cuda_streams import CudaStreams
from fxzero.runtime.graphs import teardown
from fxzero.runtime.graphs.watch import AHEAD, ReplayWatch
from tests.helpers.fake_cuda import FakeCuda


class TwoStreams:
    """`torch.cuda` as far as streams go: a log of what happens on which."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "compute"

    def Stream(self, device: Any = None) -> Any:
        return _Stream(self, "comm")

    def current_stream(self) -> Any:
        return _Stream(self, self.current)

    def Event(self) -> Any:
        cuda = self

        class Event:
            def record(self) -> None:
                self.on = cuda.current

        return Event()

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.current = self.current, stream.name
        yield
        self.current = before


class _Stream:
    def __init__(self, cuda: TwoStreams, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: Any) -> None:
        self.cuda.log.append(f"{self.name} waits for {event.on}")


def test_the_communication_stream_branches_off_and_comes_back() -> None:
    cuda = TwoStreams()
    streams = CudaStreams([Queue("compute", (0,)), Queue("communication", (1,))], [EventEdge(0, 1)], cuda)
    streams.fork()
    streams.join()
    assert cuda.log == ["comm waits for compute", "compute waits for comm"]


def lost(what: str, error: Exception) -> Exception:
    return CommunicationError(f"did not complete {what}: {error}")


def replays(watch: ReplayWatch, number: int) -> None:
    for _ in range(number):
        watch.before_replay()
        watch.after_replay()


def test_replays_that_do_not_end_are_waited_for_only_so_long() -> None:
    cuda, log = FakeCuda(), PhaseLog()
    cuda.is_stuck = True
    watch = ReplayWatch(cuda, log, lost, timeout_s=0.01)
    replays(watch, AHEAD)  # the host runs ahead
    with pytest.raises(CommunicationError, match=r"a replayed step: it has not ended within 0\.01 s"):
        watch.before_replay()
    assert log.waits == 2, "the heartbeat saw the wait, and its end"


def test_replays_end_where_a_peer_is_known_to_be_gone() -> None:
    cuda, log = FakeCuda(), PhaseLog()
    watch = ReplayWatch(cuda, log, lost, timeout_s=60)
    replays(watch, 3 * AHEAD)
    log.stop = Stop("end", "rank 1 has ended")
    with pytest.raises(CommunicationError, match="rank 1 has ended"):
        watch.before_replay()


def test_graphs_go_before_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Graphs:
        def drop(self) -> None:
            order.append("graphs")

    for module in (dist, dist.distributed_c10d):
        monkeypatch.setattr(module, "destroy_process_group", lambda group=None: order.append("group"))
    monkeypatch.setattr(teardown.atexit, "register", lambda function: None)
    teardown._install.cache_clear()
    monkeypatch.setattr(teardown, "_live", type(teardown._live)())
    graphs = Graphs()
    teardown.drop_before_groups(graphs)
    dist.destroy_process_group()
    teardown._install.cache_clear()
    assert order == ["graphs", "group"]
    assert torch.distributed.destroy_process_group is dist.distributed_c10d.destroy_process_group
