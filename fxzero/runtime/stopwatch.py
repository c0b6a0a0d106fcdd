"""Measure each line of a schedule in some steps: the generated code calls `mark` after each.

    forward    |--line 0--|--line 1--|  ...  |        backward    |--line k--|  ...  |

On a processor two clocks are read: wall time, and the processor time of the training thread. In what a line takes
beyond its processor time the thread was blocked, or another thread had its core. On a GPU an event is recorded on the
compute stream, so a wait lasts as long as that stream waits.
"""

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Sample = TypeVar("Sample")


@dataclass(eq=False)
class Stopwatch:
    """Collects the seconds of each line of a schedule over some steps."""

    steps: list[list[float]] = field(default_factory=list[list[float]])
    """For each step, seconds of processor time of the training thread by line; on a GPU, seconds of its stream."""
    walls: list[list[float]] = field(default_factory=list[list[float]])
    """For each step, seconds of wall time by line; on a GPU, seconds of its stream."""
    others: list[float] = field(default_factory=list[float])
    """For each step, seconds of processor time of all other threads."""
    cuda: Any = None
    """`torch.cuda`, or what looks like it, where a GPU computes."""
    ends: Collection[int] | None = None
    """The lines behind which there is a mark, which has the seconds of those before it too; None: all lines."""
    also: "Stopwatch | None" = None
    """Receives the seconds of these steps as well."""
    _phases: list[list[Any]] = field(default_factory=list["list[Any]"])
    """The marks of the phases of the step that runs."""
    _unread: list[list[list[Any]]] = field(default_factory=list["list[list[Any]]"])
    """The marks of steps whose events are not read yet: that waits for the GPU."""
    _others: float = 0.0
    _line: int = 0
    """The number of the line that ends next."""

    def time_phase(self, phase: Callable[..., Any], *arguments: Any, is_first: bool, is_last: bool) -> Any:
        """Run a phase whose code calls `mark`; a step is complete with its last one."""
        if is_first:
            self._phases, self._others, self._line = [], 0.0, 0
        began = time.process_time() - time.thread_time()
        self._phases.append([self._now()])
        returned = phase(*arguments)
        self._others += time.process_time() - time.thread_time() - began
        if is_last:
            self._unread.append(self._phases)
            self.others.append(self._others)
            if self.cuda is None:
                self.read()
        return returned

    @property
    def num_steps(self) -> int:
        """Steps so far, also those whose events are not read yet."""
        return len(self.walls) + len(self._unread)

    def mark(self) -> None:
        """The end of a line."""
        ends, line = self.ends, self._line
        self._line = line + 1
        self._phases[-1].append(self._now() if ends is None or line in ends else None)

    def _now(self) -> Any:
        if self.cuda is None:
            return time.perf_counter(), time.thread_time()
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> None:
        """Turn marks into seconds."""
        for phases in self._unread:
            lines = [seconds for phase in phases for seconds in self._lines_of(phase)]
            for watch in filter(None, (self, self.also)):
                watch.walls.append([wall for wall, _ in lines])
                watch.steps.append([busy for _, busy in lines])
        self._unread.clear()

    def _lines_of(self, marks: Sequence[Any]) -> list[tuple[float, float]]:
        """Seconds of wall time and of processor time of each line of a phase; none of a line without a mark."""
        lines: list[tuple[float, float]] = []
        begin = marks[0]
        for end in marks[1:]:
            lines.append((0.0, 0.0) if end is None else self._between(begin, end))
            begin = begin if end is None else end
        return lines

    def _between(self, begin: Any, end: Any) -> tuple[float, float]:
        """Seconds of wall time and of processor time between two marks."""
        if self.cuda is None:
            return end[0] - begin[0], end[1] - begin[1]
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        return seconds, seconds

    def medians(self) -> list[float]:
        """Seconds of processor time of each line over the calm steps; empty if steps had different ones."""
        return _medians(self.steps)

    def wall_medians(self) -> list[float]:
        """Seconds of wall time of each line over the calm steps; empty if steps had different ones."""
        return _medians(self.walls)


def _medians(steps: Sequence[Sequence[float]]) -> list[float]:
    if not steps or len({len(step) for step in steps}) > 1:
        return []
    return [statistics.median(values) for values in zip(*_calm(steps, sum), strict=True)]


def calm_median(samples: Sequence[float]) -> float:
    """The median of seconds that were measured when nothing else ran; 0 of none."""
    return statistics.median(_calm(samples, float) or [0.0])


def _calm(samples: Sequence[Sample], key: Callable[[Sample], float]) -> list[Sample]:
    """The lesser half: what else runs on a machine comes in bursts, and only adds to what is measured."""
    return sorted(samples, key=key)[: -(-len(samples) // 2)]
