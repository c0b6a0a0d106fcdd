"""When everything of a step happens, for given costs: one device, links that send one message after another.

device  |--compute--|--compute--|..wait..|--compute--|          slower while a link is busy, if it carries the traffic
link       [gather 1][gather 2 ]           [reduce 2]           in the order of starts

Where a node has a link of its own inside, a gather goes across nodes first and then inside, a reduction inside first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple, TypeAlias

from torch import fx

from fxzero.cost.model import Costs, Link
from fxzero.graph.nodes import Role, is_gather, role, started_by
from fxzero.graph.schedule_text import rows
from fxzero.graph.step import Phase, StepGraph
from fxzero.graph.traffic import Sent, sent_in

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
    """What a start sends, and receives, inside the node; without nodes, all."""
    across_bytes: int = 0
    """What it sends to other nodes."""

    @classmethod
    def start(cls, key: Key, sent: Sent) -> Event:
        """The start of a collective."""
        return cls("start", 0.0, key, sent.inside, sent.across)


@dataclass(frozen=True)
class Timeline:
    """How long a step takes, and why."""

    step_s: float
    compute_s: float
    """Of the device, without any traffic."""
    slowed_s: float
    """By which traffic on the same cores lengthens compute."""
    wire_s: float
    """Of the link; of two, of both together."""
    stalls: dict[Key, float]
    """How long each collective is waited for, where that is more than nothing."""

    @property
    def stalled_s(self) -> float:
        """Time in which the device has nothing to do."""
        return sum(self.stalls.values())


def events(step: StepGraph, costs: Costs, nodes: Iterable[fx.Node] | None = None) -> list[Event]:
    """What a rank does in a step, in order; compute between collectives is one event. The optimizer's step is last.

    Args:
        nodes: some nodes of the step; default: all, and the optimizer.
    """
    found: list[Event] = []
    compute = 0.0
    for node in step.graph.nodes if nodes is None else nodes:
        kind = role(node)
        if kind in (Role.ALL_GATHER, Role.REDUCE_SCATTER, Role.WAIT) and step.sharding.shard_ranks > 1:
            if compute:
                found.append(Event("compute", compute))
            start = started_by(node)
            found.append(Event.start(start, sent_in(step, start)) if node is start else Event("wait", 0.0, start))
            compute = 0.0
        compute += costs.of(node)
    compute += costs.optimizer_s if nodes is None else 0.0
    if compute:
        found.append(Event("compute", compute))
    return found


def is_gather_key(key: Key) -> bool:
    """True for a gather, not for a reduction."""
    return is_gather(key) if isinstance(key, fx.Node) else key[0] is Role.ALL_GATHER


class _Wire:
    """A link, and until when it is busy."""

    def __init__(self, link: Link) -> None:
        self.load, self._rate, self._latency_s = link.load, link.loaded_bytes_per_s, link.latency_s
        self.busy_until = self.busy_s = 0.0

    def carry(self, at: float, nbytes: int) -> float:
        """Send a message that is there at a time; when it arrives."""
        if not nbytes:
            return at
        on_wire = nbytes / self._rate
        self.busy_until = max(self.busy_until, at) + on_wire
        self.busy_s += on_wire
        return self.busy_until + self._latency_s


def _slowed(now: float, seconds: float, wires: Iterable[_Wire]) -> float:
    """By how much compute that begins now is lengthened by what some links carry meanwhile."""
    at, left = now, seconds
    busy = sorted((wire.busy_until, wire.load) for wire in wires)
    for index, (until, _) in enumerate(busy):
        free = 1.0 - sum(load for _, load in busy[index:])
        if until > at and left:
            done = min(left, (until - at) * free)
            at, left = at + done / free if free else until, left - done
    return at + left - now - seconds


def play(
    happening: Iterable[Event], link: Link, inside: Link | None = None, begins: list[float] | None = None
) -> Timeline:
    """Let everything happen in order.

    Args:
        link: that of all bytes, or of those that cross nodes.
        inside: that of bytes that stay inside a node, if it is another one.
        begins: receives the time at which each event begins.
    """
    across = _Wire(link)
    within = across if inside is None else _Wire(inside)
    now = compute_s = slowed_s = 0.0
    arrives: dict[Key, float] = {}
    stalls: dict[Key, float] = {}
    for kind, seconds, key, nbytes, across_bytes in happening:
        if begins is not None:
            begins.append(now)
        if kind == "compute":
            compute_s += seconds
            if within is across or within.busy_until <= now:
                shared = min(seconds, max(0.0, across.busy_until - now) * (1.0 - across.load))
                slowed = shared / (1.0 - across.load) - shared
            else:
                slowed = _slowed(now, seconds, (across, within))
            slowed_s += slowed
            now += seconds + slowed
            continue
        assert key is not None
        if kind == "start":
            if within is across:
                arrives[key] = across.carry(now, nbytes + across_bytes)
            elif across_bytes and is_gather_key(key):
                arrives[key] = within.carry(across.carry(now, across_bytes), nbytes)
            else:
                arrives[key] = across.carry(within.carry(now, nbytes), across_bytes)
        elif (late := arrives[key] - now) > 0:
            stalls[key] = late
            now += late
    wire_s = across.busy_s if within is across else across.busy_s + within.busy_s
    return Timeline(now, compute_s, slowed_s, wire_s, stalls)


def simulate(step: StepGraph, costs: Costs) -> Timeline:
    """How long a step takes for these costs."""
    return play(events(step, costs), costs.link, costs.inside)


def simulate_lines(step: StepGraph, costs: Costs) -> list[float]:
    """The seconds of each line of a schedule for these costs."""
    happening = [events(step, costs, line.nodes) for line in rows(step)]
    begins: list[float] = []
    played = play(chain.from_iterable(happening), costs.link, costs.inside, begins)
    ends, seconds, end = iter([*begins[1:], played.step_s]), list[float](), 0.0
    for own in happening:
        begin = end
        for _ in own:
            end = next(ends)
        seconds.append(end - begin)
    return seconds
