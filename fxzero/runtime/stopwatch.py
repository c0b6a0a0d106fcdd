"""Measure each run of compute in a step: the processor time of the training thread between collectives.

    forward    |--run 0--| start |--run 1--| wait |--run 2--|        one number per run, and one per collective

Processor time leaves out what the thread waits for, and gloo's own threads where they take the core in between. Theirs
is measured too: runs that were measured under traffic have the rest of a byte's cost in them already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import fx

from fxzero.cost.model import Costs
from fxzero.graph.step import Role, StepGraph, members, role, started_by

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


def seconds_by_name(step: StepGraph, estimated: Costs, measured: list[float]) -> dict[str, float]:
    """Seconds of each node, by name: those of a run are shared out in the ratio of the estimates.

    The time of a start is left out: it is that of sending, which the link's cost per byte has already.

    Returns:
        Empty if `measured` is of another step.
    """
    runs: list[list[fx.Node]] = []
    for _, nodes in step.phases():
        runs.append([])
        for node in nodes:
            if role(node) in (Role.ALL_GATHER, Role.REDUCE_SCATTER, Role.WAIT):
                runs += [[node], []]
            else:
                runs[-1].append(node)
    if len(runs) != len(measured):
        return {}
    found: dict[str, float] = {}
    for nodes, seconds in zip(runs, measured, strict=True):
        if len(nodes) == 1 and role(nodes[0]) in (Role.ALL_GATHER, Role.REDUCE_SCATTER):
            continue
        shares = [estimated.of(node) for node in nodes]
        total = sum(shares)
        for node, share in zip(nodes, shares, strict=True):
            if share:
                found[_name(node)] = seconds * share / total
    return found


def with_measured(
    step: StepGraph, estimated: Costs, by_name: Mapping[str, float], optimizer_s: float, cpu_s_per_byte: float
) -> Costs:
    """The costs of a step with what was measured, also in a plan with another order; other nodes in proportion.

    Args:
        cpu_s_per_byte: of threads other than the one that was measured.
    """
    known = {node: by_name[_name(node)] for node in estimated.seconds if _name(node) in by_name}
    of_known = sum(estimated.of(node) for node in known)
    ratio = sum(known.values()) / of_known if of_known else 1.0
    seconds = {node: known.get(node, ratio * estimate) for node, estimate in estimated.seconds.items()}
    link, inside = estimated.link, estimated.inside
    return Costs(
        seconds,
        replace(link, cpu_s_per_byte=cpu_s_per_byte),
        optimizer_s,
        None if inside is None else replace(inside, cpu_s_per_byte=cpu_s_per_byte),
    )


def _name(node: fx.Node) -> str:
    """What a node is called in every plan of a step: waits are numbered by what they wait for."""
    start = started_by(node)
    return node.name if start is node else f"wait {role(start).value} {' '.join(members(start))}"
