"""Ranges of torch.profiler for the lines of a schedule: the generated code calls `mark` after each of them.

    fxzero forward     |--all_gather layers.1.weight--|--compute layers.0--|  ...  |
    fxzero backward    |--compute layers.1--|--reduce_scatter layers.1.weight--|  ...  |

They are made while a profiler records; other steps run the code without marks.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import record_function

from fxzero.graph.schedule_text import rows
from fxzero.graph.step import Phase, StepGraph
from fxzero.runtime.stopwatch import Stopwatch


class Ranges:
    """The ranges of one graph."""

    def __init__(self, step: StepGraph) -> None:
        self.also: Stopwatch | None = None
        """Measures the same steps."""
        self._labels: dict[Phase, list[str]] = {phase: [] for phase in Phase}
        for row in rows(step):
            self._labels[row.phase].append(f"{row.action} {row.name}")
        self._left: Iterator[str] = iter(())
        self._open: record_function | None = None

    def run(self, phase: Phase, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run the code of a phase, with a range for each of its lines."""
        self._left = iter(self._labels[phase])
        with record_function(f"fxzero {phase.value}"):
            self._next()
            try:
                return function(*arguments)
            finally:
                self._close()

    def mark(self) -> None:
        """The end of a line."""
        self._close()
        if self.also is not None:
            self.also.mark()
        self._next()

    def _next(self) -> None:
        label = next(self._left, None)
        if label is not None:
            self._open = record_function(label)
            self._open.__enter__()

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
