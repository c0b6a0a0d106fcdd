"""`zero.schedule`: what will happen in a step, for people to print."""

from collections.abc import Callable
from pathlib import Path

from torch import fx

from fxzero.capture.guards import Guards
from fxzero.cost.measured import MeasuredLines
from fxzero.cost.report import Timing, format_measured
from fxzero.errors import FxzeroError
from fxzero.graph.schedule_text import Totals, format_schedule, format_table, totals
from fxzero.graph.step import StepGraph
from fxzero.memory.report import MemoryReport
from fxzero.planning.island_share import islands_line
from fxzero.planning.plan import Plan, VariantPlan
from fxzero.planning.saved_plan import SavedPlan


class Schedule:
    """What will happen in a step; print it.

    Args:
        plan: what was decided; None before anything was traced.
        memory: makes the report of the memory that it needs.
        timing: makes the prediction of its time; None where no costs are known.
        variant: the way in which the step is shown to run. Default: the first of the plan, which overwrites gradients.
        measure: gives what was measured of each line, and begins to measure; None where nothing runs.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        memory: Callable[[], MemoryReport] | None = None,
        timing: Callable[[], Timing] | None = None,
        variant: VariantPlan | None = None,
        measure: Callable[[], MeasuredLines] | None = None,
    ) -> None:
        self._plan = plan
        self._variant = variant if variant is not None or plan is None else plan.form(synchronize=True)
        self._memory = memory
        self._timing = timing
        self._measure = measure

    @property
    def plan(self) -> Plan:
        """All that was decided about this kind of call.

        Raises:
            FxzeroError: nothing was traced yet; it says how to. So do all other members, but `str()`.
        """
        if self._plan is None:
            raise FxzeroError(str(self))
        return self._plan

    @property
    def variant(self) -> VariantPlan:
        """The way in which the step runs that is shown here: its graph, offsets, events and code."""
        if self._variant is None:
            raise FxzeroError(str(self))
        return self._variant

    @property
    def step(self) -> StepGraph:
        """The step in fxzero's own terms."""
        return self.variant.step

    @property
    def graph(self) -> fx.Graph:
        """The torch.fx graph of the step, its collectives included."""
        return self.step.graph

    @property
    def code(self) -> str:
        """The generated source that runs."""
        return self.variant.code.source

    def saved(self) -> SavedPlan:
        """The whole plan as data, to keep as JSON and to compare with another (`fxzero.planner.diff`)."""
        return SavedPlan.of(self.plan)

    @property
    def guards(self) -> Guards:
        """The Python state that this schedule was traced for: print it. Another state has another plan."""
        return self.plan.captured.state.guards

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

    def text(self, *, memory: bool = False, measured: bool = False) -> str:
        """The schedule line by line.

        Args:
            memory: add the bytes of gathered and gradient buckets that are live after each line.
            measured: add the milliseconds of each line, as predicted (where costs are known) and as measured, and for
                how many of them each wait blocked. Asked for the first time, it begins to measure: the next 8 steps of
                this kind of call, of which the medians are shown from then on.

        Raises:
            FxzeroError: with `measured`, for a schedule that nothing runs.
        """
        if not measured:
            return "\n".join([format_schedule(self.step, memory=memory), *islands_line(self.step)])
        if self._measure is None:
            raise FxzeroError(
                "Nothing runs this schedule: measure that of a compiled module, as zero.schedule.text(measured=True)."
            )
        predicted = [] if self._timing is None else self.timing.lines()
        return format_measured(self.step, predicted, self._measure(), memory=memory)

    def __str__(self) -> str:
        if self._plan is None:
            return (
                "Nothing is traced yet: call the module once, or pass example= to fxzero.compile, to see the schedule."
            )
        return self.text() if self._timing is None else f"{self.text()}\n{self.timing.line()}"

    __repr__ = __str__
