"""What a step is predicted to take, beside what it must take at least; what `zero.schedule.timing` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tabulate import tabulate
from torch import fx

from fxzero.cost.lower_bound import Bound, lower_bound
from fxzero.cost.measured import MEASURED_STEPS, MeasuredLines
from fxzero.cost.model import Costs
from fxzero.cost.timeline import Timeline, simulate, simulate_lines
from fxzero.graph.names import bucket_label
from fxzero.graph.nodes import Role, members, role
from fxzero.graph.schedule_text import format_schedule, rows
from fxzero.graph.step import StepGraph


@dataclass(frozen=True)
class Timing:
    """The prediction for one plan, and the lower bound for the same costs; print it."""

    timeline: Timeline
    bound: Bound
    costs: Costs
    step: StepGraph

    @classmethod
    def of(cls, step: StepGraph, costs: Costs) -> Timing:
        """Predict a complete plan."""
        return cls(simulate(step, costs), lower_bound(step, costs), costs, step)

    def at_rate(self, bytes_per_s: float) -> Timing:
        """The same plan where the link (of two: across nodes) carries so many bytes a second; all else as it is."""
        link = replace(self.costs.link, bytes_per_s=bytes_per_s)
        return Timing.of(self.step, replace(self.costs, link=link))

    @property
    def predicted_step_s(self) -> float:
        """Seconds of forward, backward and the optimizer's step."""
        return self.timeline.step_s

    @property
    def lower_bound_s(self) -> float:
        """Seconds below which no schedule gets for these costs, whatever its buckets and its order."""
        return self.bound.step_s

    @property
    def ratio(self) -> float:
        """Predicted over lower bound: how far from optimal the schedule can be at most."""
        return self.predicted_step_s / self.lower_bound_s if self.lower_bound_s else 1.0

    def lines(self) -> list[float]:
        """The predicted seconds of each line of the schedule."""
        return simulate_lines(self.step, self.costs)

    def line(self) -> str:
        """The three numbers, in one line."""
        return (
            f"predicted step {_seconds(self.predicted_step_s)}  lower bound {_seconds(self.lower_bound_s)} "
            f"({self.bound.limit})  ratio {self.ratio:.3f}"
        )

    def __str__(self) -> str:
        played, bound = self.timeline, self.bound
        rows = [
            ("compute", played.compute_s - self.costs.optimizer_s),
            ("optimizer", self.costs.optimizer_s),
            ("slowed by traffic", played.slowed_s),
            *((f"waiting for {bucket_label(members(key))}", late) for key, late in _longest(played)),
            ("waiting, in all", played.stalled_s),
            ("predicted step", played.step_s),
            ("lower bound", bound.step_s),
            ("  compute, with its traffic", bound.busy_s),
            ("  head that nothing hides", bound.head_s),
            ("  tail that nothing hides", bound.tail_s),
            ("  communication", bound.link_s),
            ("  critical path", bound.path_s),
        ]
        cells = [(name, _seconds(seconds)) for name, seconds in rows]
        cells.append(("predicted / lower bound", f"{self.ratio:.3f}"))
        return tabulate(cells, headers=("a step of a rank", "time"), colalign=("left", "right"))


def format_measured(step: StepGraph, predicted: Sequence[float], measured: MeasuredLines, *, memory: bool) -> str:
    """A schedule with the milliseconds of each line: predicted, measured, and how many of those each wait blocked.

    Args:
        predicted: the seconds of each line; empty where no costs are known.
        measured: empty before the first step.
        memory: as of `format_schedule`.
    """
    waits = [role(line.nodes[-1]) is Role.WAIT for line in rows(step)]
    walls, busy = measured.wall_s or [0.0] * len(waits), measured.busy_s or [0.0] * len(waits)
    # A GPU's stream does nothing else while it waits.
    blocked = [max(0.0, wall - own) if own != wall else wall for wall, own in zip(walls, busy, strict=True)]
    blocked = [seconds if is_wait else 0.0 for seconds, is_wait in zip(blocked, waits, strict=True)]
    columns = {"measured ms": _cells(walls), "blocked ms": _cells(blocked)}
    if predicted:
        columns = {"predicted ms": _cells(predicted)} | columns
    lines = [format_schedule(step, memory=memory, columns=columns)]
    if measured.num_steps < MEASURED_STEPS:
        left = MEASURED_STEPS - measured.num_steps
        lines.append(f"measured: {measured.num_steps} steps; print this again after {left} more")
    totals = [f"predicted {_seconds(sum(predicted))}"] if predicted else []
    if measured.num_steps:
        totals.append(f"measured {_seconds(sum(walls))}, of which waits blocked {_seconds(sum(blocked))}")
    if totals:
        lines.append(f"forward and backward: {'; '.join(totals)}")
    return "\n".join(lines)


def _cells(seconds: Sequence[float]) -> list[str]:
    return [f"{1e3 * each:.2f}" if each >= 5e-6 else "" for each in seconds]


def _longest(played: Timeline) -> list[tuple[fx.Node, float]]:
    """The longest three waits."""
    nodes = [(key, late) for key, late in played.stalls.items() if isinstance(key, fx.Node)]
    return sorted(nodes, key=lambda item: -item[1])[:3]


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
