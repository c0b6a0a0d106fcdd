"""The stopwatch of the lines of a schedule; a GPU's clock is a fake that counts what was recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxzero.runtime.stopwatch import Stopwatch


@dataclass
class FakeCuda:
    """`torch.cuda`, as far as events are concerned: the n-th that is recorded happens at `n * n` milliseconds."""

    recorded: list[Any] = field(default_factory=list[Any])
    synchronized: int = 0

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        cuda = self

        class Event:
            def record(self) -> None:
                self.at_ms = float(len(cuda.recorded) ** 2)
                cuda.recorded.append(self)

            def synchronize(self) -> None:
                cuda.synchronized += 1

            def elapsed_time(self, end: Event) -> float:
                return end.at_ms - self.at_ms

        return Event()


def lines(watch: Stopwatch, number: int) -> None:
    for _ in range(number):
        watch.mark()


def test_a_step_has_the_lines_of_both_phases() -> None:
    watch = Stopwatch()
    for _ in range(3):
        watch.time_phase(lines, watch, 2, is_first=True, is_last=False)
        watch.time_phase(lines, watch, 3, is_first=False, is_last=True)
    assert [len(step) for step in watch.steps] == [len(step) for step in watch.walls] == [5, 5, 5]
    assert len(watch.others) == 3
    assert all(seconds >= 0 for step in watch.walls for seconds in step)


def test_a_forward_without_backward_is_a_step_and_one_that_failed_is_none() -> None:
    watch = Stopwatch()
    watch.time_phase(lines, watch, 4, is_first=True, is_last=False)  # no backward came
    watch.time_phase(lines, watch, 2, is_first=True, is_last=True)
    assert [len(step) for step in watch.steps] == [2]


def test_another_stopwatch_receives_the_same_steps() -> None:
    asked = Stopwatch()
    watch = Stopwatch(also=asked)
    watch.time_phase(lines, watch, 2, is_first=True, is_last=True)
    watch.also = None
    watch.time_phase(lines, watch, 2, is_first=True, is_last=True)
    assert (asked.walls, asked.steps) == (watch.walls[:1], watch.steps[:1])
    assert (asked.num_steps, watch.num_steps) == (1, 2)


def test_steps_of_different_plans_have_no_medians() -> None:
    watch = Stopwatch()
    for number in (2, 3):
        watch.time_phase(lines, watch, number, is_first=True, is_last=True)
    assert watch.medians() == watch.wall_medians() == []


def test_on_a_gpu_events_are_recorded_and_read_later() -> None:
    cuda = FakeCuda()
    watch = Stopwatch(cuda=cuda)
    watch.time_phase(lines, watch, 2, is_first=True, is_last=False)
    watch.time_phase(lines, watch, 1, is_first=False, is_last=True)
    assert len(cuda.recorded) == 5  # one more at the begin of each phase
    assert cuda.synchronized == 0, "a step waits for no event"
    assert watch.walls == []
    watch.read()
    assert watch.walls == watch.steps == [[0.001, 0.003, 0.007]]
    assert cuda.synchronized == 3


def test_a_run_of_lines_has_one_mark_and_its_last_line_has_the_seconds() -> None:
    cuda = FakeCuda()
    watch = Stopwatch(cuda=cuda, ends={1, 2, 4})
    watch.time_phase(lines, watch, 3, is_first=True, is_last=False)
    watch.time_phase(lines, watch, 2, is_first=False, is_last=True)
    assert len(cuda.recorded) == 2 + 3
    watch.read()
    assert watch.walls == [[0.0, 0.001, 0.003, 0.0, 0.007]]
