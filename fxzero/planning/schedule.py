"""`zero.schedule`: what will happen in a step, for people to print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import fx

from fxzero.cost.report import Timing
from fxzero.errors import FxzeroError
from fxzero.graph.schedule_text import Totals, format_schedule, format_table, totals
from fxzero.graph.step import (
    StepGraph,
)
from fxzero.memory.report import MemoryReport


class Schedule:
    """What will happen in a step; print it.

    Args:
        step: the planned step; None before anything was traced.
        code: the source that was generated from it.
        memory: makes the report of the memory that it needs.
        timing: makes the prediction of its time; None where no costs are known.
    """

    def __init__(
        self,
        step: StepGraph | None = None,
        code: str = "",
        memory: Callable[[], MemoryReport] | None = None,
        timing: Callable[[], Timing] | None = None,
    ) -> None:
        self._step = step
        self._code = code
        self._memory = memory
        self._timing = timing

    @property
    def step(self) -> StepGraph:
        """The step in fxzero's own terms.

        Raises:
            FxzeroError: nothing was traced yet; it says how to. So do all other members, but `str()`.
        """
        if self._step is None:
            raise FxzeroError(str(self))
        return self._step

    @property
    def graph(self) -> fx.Graph:
        """The torch.fx graph of the step, its collectives included."""
        return self.step.graph

    @property
    def code(self) -> str:
        """The generated source that runs."""
        return self._code if self.step else ""

    @property
    def totals(self) -> Totals:
        """Collectives and bytes per step and rank."""
        return totals(self.step)

    @property
    def gathered_bytes_per_step(self) -> int:
        """Bytes that a rank receives from all-gathers in one step."""
        return self.totals.gathered_bytes

    @property
    def memory(self) -> MemoryReport:
        """The bytes that a rank needs, by kind: print it, or `.plot_memory("memory.png")`."""
        if self._memory is None:
            raise FxzeroError(str(self))
        return self._memory()

    @property
    def timing(self) -> Timing:
        """The predicted time of a step beside its lower bound; print it.

        Raises:
            FxzeroError: no costs are known: on one rank, or of a small model, without a cluster.
        """
        if self._timing is None:
            raise FxzeroError(
                "No costs are known for this plan. Pass cluster= (fxzero.Cluster, or a name); without it several ranks "
                "calibrate models of 1 MiB or more at their first step."
            )
        return self._timing()

    def plot_memory(self, path: str | Path) -> None:
        """Draw live bytes over the step, by kind, as a stacked area with the peak marked.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        self.memory.plot_memory(path)

    def table(self) -> str:
        """The schedule as a table, with phases, bytes and live bytes."""
        return format_table(self.step)

    def text(self, *, memory: bool = False) -> str:
        """The schedule line by line.

        Args:
            memory: add the bytes of gathered and gradient buckets that are live after each line.
        """
        return format_schedule(self.step, memory=memory)

    def __str__(self) -> str:
        if self._step is None:
            return (
                "Nothing is traced yet: call the module once, or pass example= to fxzero.compile, to see the schedule."
            )
        return self.text() if self._timing is None else f"{self.text()}\n{self.timing.line()}"

    __repr__ = __str__
