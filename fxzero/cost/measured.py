"""The seconds that were measured in some steps, as costs of any plan of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from fxzero.cost.model import Costs
from fxzero.graph.nodes import Role, members, role, started_by
from fxzero.graph.schedule_text import rows
from fxzero.graph.step import StepGraph

MEASURED_STEPS = 8
"""Steps over which seconds are measured."""
_COLLECTIVES = (Role.ALL_GATHER, Role.REDUCE_SCATTER, Role.WAIT)


@dataclass(frozen=True)
class Clock:
    """What the seconds of the lines of a schedule mean, as a device measures them."""

    every_line: bool
    """Each line is measured; else the runs between collectives are, since each mark takes the device some time."""
    counts_waits: bool
    """A wait lasts as long as its work, not as long as the message."""
    sees_host: bool
    """Seconds of the optimizer and of other threads are those of the device that computes."""


CLOCKS: Mapping[str, Clock] = {
    "cpu": Clock(every_line=True, counts_waits=True, sees_host=True),
    "cuda": Clock(every_line=False, counts_waits=False, sees_host=False),
}
"""How compute is measured, by the type of the device. On a GPU by events on the compute stream, read afterwards."""


@dataclass(frozen=True)
class MeasuredLines:
    """The seconds of each line of a schedule, as medians over some steps; empty before the first step."""

    num_steps: int
    wall_s: Sequence[float]
    """Seconds of wall time of each line; on a GPU, of its stream."""
    busy_s: Sequence[float]
    """Seconds of processor time of the training thread in each line; on a GPU, seconds of its stream."""


def ends_of_runs(step: StepGraph) -> frozenset[int]:
    """The numbers of the lines behind which a run of compute, or a collective, ends."""
    lines = list(rows(step))
    is_collective = [role(line.nodes[-1]) in _COLLECTIVES for line in lines]
    last = len(lines) - 1
    return frozenset(
        i
        for i, line in enumerate(lines)
        if i == last or is_collective[i] or is_collective[i + 1] or lines[i + 1].phase is not line.phase
    )


def seconds_by_run(step: StepGraph, seconds: Sequence[float]) -> list[float]:
    """Seconds of each run of lines between collectives and of each collective, in order; a run may be empty.

    Args:
        seconds: of each line of the schedule.

    Returns:
        Empty if `seconds` is of another step.
    """
    lines = list(rows(step))
    if len(lines) != len(seconds):
        return []
    found: list[float] = []
    for phase, _ in step.phases():
        run = 0.0
        for line, each in zip(lines, seconds, strict=True):
            if line.phase is phase and role(line.nodes[-1]) in _COLLECTIVES:
                found += [run, each]
                run = 0.0
            elif line.phase is phase:
                run += each
        found.append(run)
    return found


def seconds_by_name(
    step: StepGraph, estimated: Costs, measured: list[float], *, counts_waits: bool = True
) -> dict[str, float]:
    """Seconds of each node, by name: those of a run are shared out in the ratio of the estimates.

    The time of a start is left out: it is that of sending, which the link's cost per byte has already.

    Args:
        counts_waits: take the seconds of waits as those of their work; else these stay estimates.

    Returns:
        Empty if `measured` is of another step.
    """
    runs: list[list[fx.Node]] = []
    for _, nodes in step.phases():
        runs.append([])
        for node in nodes:
            if role(node) in _COLLECTIVES:
                runs += [[node], []]
            else:
                runs[-1].append(node)
    if len(runs) != len(measured):
        return {}
    found: dict[str, float] = {}
    left_out = (Role.ALL_GATHER, Role.REDUCE_SCATTER) if counts_waits else _COLLECTIVES
    for nodes, seconds in zip(runs, measured, strict=True):
        if len(nodes) == 1 and role(nodes[0]) in left_out:
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
