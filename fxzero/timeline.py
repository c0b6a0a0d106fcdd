"""When everything of a step happens, for given costs: one device, one link that sends one message after another.

device  |--compute--|--compute--|..wait..|--compute--|          slower while the link is busy, if it carries the traffic
link       [gather 1][gather 2 ]           [reduce 2]           in the order of starts
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from torch import fx

from fxzero.cost import Costs, Link
from fxzero.ir import Phase, Role, StepGraph, members, role, started_by, tail_waits
from fxzero.schedule import across_bytes, inside_bytes

Key: TypeAlias = "fx.Node | tuple[Role, Phase, tuple[str, ...]]"
"""Which collective: its start in a graph; where there is none, what it is, in which phase, and its members."""


class Event(NamedTuple):
    """One thing that a rank does."""

    kind: Literal["compute", "start", "wait"]
    seconds: float = 0.0
    """Of compute, on an idle machine."""
    key: Key | None = None
    """The collective that is started, or waited for."""
    nbytes: int = 0
    """What a start sends, and receives."""


@dataclass(frozen=True)
class Timeline:
    """How long a step takes, and why."""

    step_s: float
    compute_s: float
    """Of the device, without any traffic."""
    slowed_s: float
    """By which traffic on the same cores lengthens compute."""
    wire_s: float
    """Of the link."""
    stalls: dict[Key, float]
    """How long each collective is waited for, where that is more than nothing."""

    @property
    def stalled_s(self) -> float:
        """Time in which the device has nothing to do."""
        return sum(self.stalls.values())


def shares_of_optimizer(step: StepGraph, reductions: Iterable[Iterable[str]]) -> tuple[float, list[float]]:
    """Which parts of the optimizer's step come before the last reductions have arrived, and after each of them.

    Args:
        reductions: the members of each.
    """
    total = sum(step.params[fqn].nbytes for fqn in step.grads)
    shares = [sum(step.params[fqn].nbytes for fqn in fqns) / total for fqns in reductions]
    return 1.0 - sum(shares), shares


def events(step: StepGraph, costs: Costs) -> list[Event]:
    """What a rank does in a step, in order; compute between collectives is one event. The optimizer's step is last.

    Where it is overlapped, it comes in parts between the last waits. Of several nodes, all bytes are those of one link.
    """
    found: list[Event] = []
    compute = 0.0
    waits = tail_waits(step) if step.overlaps_optimizer and step.world_size > 1 else []
    before, after = shares_of_optimizer(step, map(members, waits))
    shares = dict(zip(waits, after, strict=True))
    for node in step.graph.nodes:
        kind = role(node)
        if waits and node is waits[0]:
            compute += before * costs.optimizer_s
        if kind in (Role.ALL_GATHER, Role.REDUCE_SCATTER, Role.WAIT) and step.world_size > 1:
            if compute:
                found.append(Event("compute", compute))
            start = started_by(node)
            nbytes = inside_bytes(step, start) + across_bytes(step, start) if node is start else 0
            found.append(Event("start" if node is start else "wait", 0.0, start, nbytes))
            compute = 0.0
        compute += costs.of(node) + shares.get(node, 0.0) * costs.optimizer_s
    compute += 0.0 if waits else costs.optimizer_s
    if compute:
        found.append(Event("compute", compute))
    return found


def play(happening: Iterable[Event], link: Link) -> Timeline:
    """Let everything happen in order."""
    load, rate = link.load, link.loaded_bytes_per_s
    now = busy_until = compute_s = slowed_s = wire_s = 0.0
    arrives: dict[Key, float] = {}
    stalls: dict[Key, float] = {}
    for kind, seconds, key, nbytes in happening:
        if kind == "compute":
            compute_s += seconds
            shared = min(seconds, max(0.0, busy_until - now) * (1.0 - load))
            slowed = shared / (1.0 - load) - shared
            slowed_s += slowed
            now += seconds + slowed
            continue
        assert key is not None
        if kind == "start":
            on_wire = nbytes / rate
            busy_until = max(busy_until, now) + on_wire
            wire_s += on_wire
            arrives[key] = busy_until + link.latency_s
        elif (late := arrives[key] - now) > 0:
            stalls[key] = late
            now += late
    return Timeline(now, compute_s, slowed_s, wire_s, stalls)


def simulate(step: StepGraph, costs: Costs) -> Timeline:
    """How long a step takes for these costs."""
    return play(events(step, costs), costs.link)
