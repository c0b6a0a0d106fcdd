"""All that is decided about one kind of call, before it is bound to memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxzero.capture import Captured
from fxzero.graph.step import StepGraph
from fxzero.graph.verify import verify_plan
from fxzero.host.gc_pause import gc_paused
from fxzero.passes import Pass
from fxzero.planning.codegen import Code, generate
from fxzero.planning.keep_within_budget import Choice
from fxzero.planning.run_passes import Observer, run_passes


@dataclass(frozen=True)
class Plan:
    """All that is decided about a step, before it is bound to memory."""

    captured: Captured
    code: Code

    @property
    def step(self) -> StepGraph:
        return self.captured.step


def make_plan(
    captured: Captured, passes: Sequence[Pass], choice: Choice | None = None, observers: Sequence[Observer] = ()
) -> Plan:
    """Run the passes over a captured step, prove the whole plan, and write the code.

    Args:
        choice: what a memory budget decided.

    Raises:
        ScheduleError: a pass left the schedule unsafe, or all of them left it incomplete.
    """
    with gc_paused():
        run_passes(captured.step, passes if choice is None else choice.passes(passes), observers=observers)
        verify_plan(captured.step)
        return Plan(captured, generate(captured.step))
