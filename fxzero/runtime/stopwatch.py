"""Measure each run of compute in a step: the processor time of the training thread between collectives.

    forward    |--run 0--| start |--run 1--| wait |--run 2--|        one number per run, and one per collective

Processor time leaves out what the thread waits for, and gloo's own threads where they take the core in between. Theirs
is measured too: runs that were measured under traffic have the rest of a byte's cost in them already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Sample = TypeVar("Sample")


@dataclass
class Stopwatch:
    """Collects what some steps took."""

    steps: list[list[float]] = field(default_factory=list[list[float]])
    """Of each step, seconds of its runs and collectives, in order."""
    others: list[float] = field(default_factory=list[float])
    """Of each step, seconds of all other threads."""
    _seconds: list[float] = field(default_factory=list[float])
    _others: float = 0.0
    _last: float = 0.0

    def time_phase(self, phase: Callable[..., Any], *arguments: Any, is_first: bool) -> Any:
        """Run a phase whose collectives are timed; a step is complete with the second."""
        if is_first:
            self._seconds.clear()
            self._others = 0.0
        began = time.process_time() - time.thread_time()
        self._last = time.thread_time()
        returned = phase(*arguments)
        self.split()
        self._others += time.process_time() - time.thread_time() - began
        if not is_first:
            self.steps.append(list(self._seconds))
            self.others.append(self._others)
        return returned

    def split(self) -> None:
        """The end of a run or of a collective."""
        now = time.thread_time()
        self._seconds.append(now - self._last)
        self._last = now

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A start or a wait, with the time it takes."""

        def timed_call() -> None:
            self.split()
            call()
            self.split()

        return timed_call

    def medians(self) -> list[float]:
        """Of each run and collective over the calm steps; empty if steps had different ones."""
        if not self.steps or len({len(step) for step in self.steps}) > 1:
            return []
        return [statistics.median(values) for values in zip(*_calm(self.steps, sum), strict=True)]


def calm_median(samples: Sequence[float]) -> float:
    """The median of seconds that were measured when nothing else ran; 0 of none."""
    return statistics.median(_calm(samples, float) or [0.0])


def _calm(samples: Sequence[Sample], key: Callable[[Sample], float]) -> list[Sample]:
    """The lesser half: what else runs on a machine comes in bursts, and only adds to what is measured."""
    return sorted(samples, key=key)[: -(-len(samples) // 2)]
