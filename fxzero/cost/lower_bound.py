"""A lower bound on the time of a step: no order of its collectives, and no buckets, can be faster for these costs.

busy        all compute, and what traffic takes from it where it shares the cores
head, tail  before the reader of a parameter runs, everything up to it must have arrived; after a gradient is ready,
            it and all later ones must be sent. Where that takes longer than the compute there, nothing hides the rest.
link        all bytes, one message after another; of two links, those of the slower
path        the longest chain of one gather, compute, and one reduction

    |--- head ---|------------- busy -------------|-- tail --|

Messages are single parameters, without latency, so the bound holds for every choice of buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx
from torch import fx

from fxzero.cost.model import Costs, Link
from fxzero.graph.aliasing import in_memory_of
from fxzero.graph.nodes import Role, gathered_params, grad_fqn, is_gather, members, operands, role, started_by
from fxzero.graph.step import StepGraph
from fxzero.graph.traffic import NOTHING, Sent, sent_in


@dataclass(frozen=True)
class Bound:
    """The parts of the bound, in seconds, of forward, backward and the optimizer's step."""

    busy_s: float
    head_s: float
    tail_s: float
    link_s: float
    path_s: float

    @property
    def step_s(self) -> float:
        return max(self.busy_s + self.head_s + self.tail_s, self.link_s, self.path_s)

    @property
    def limit(self) -> str:
        """Which of them is the largest."""
        parts = {
            "compute": self.busy_s + self.head_s + self.tail_s,
            "communication": self.link_s,
            "critical path": self.path_s,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class _Needs:
    """Of each run of compute: seconds, bytes that must have arrived for it, bytes that can be sent after it."""

    seconds: list[float]
    arriving: list[Sent]
    leaving: list[Sent]

    def over(self, link: _Carrier) -> _Traffic:
        """The bytes that one link carries."""
        return _Traffic([link.nbytes(sent) for sent in self.arriving], [link.nbytes(sent) for sent in self.leaving])


class _Traffic(NamedTuple):
    """Of each run of compute, what of its bytes one link carries."""

    arriving: list[int]
    leaving: list[int]

    @property
    def total(self) -> int:
        return sum(self.arriving) + sum(self.leaving)


class _Carrier(NamedTuple):
    """A link, and which bytes it carries."""

    link: Link
    nbytes: Callable[[Sent], int]

    @property
    def per_byte(self) -> float:
        """Seconds that a byte takes from compute."""
        return min(self.link.cpu_s_per_byte, 1.0 / self.link.bytes_per_s)


def _carriers(costs: Costs) -> list[_Carrier]:
    """The links of a rank: one for all, or one inside its node and one to others."""
    if costs.inside is None:
        return [_Carrier(costs.link, lambda sent: sent.total)]
    return [_Carrier(costs.link, lambda sent: sent.across), _Carrier(costs.inside, lambda sent: sent.inside)]


def lower_bound(step: StepGraph, costs: Costs) -> Bound:
    """The bound for a complete plan: what it gathers and keeps stays, all else may be in any order.

    Of two links, head and tail are those of the one that gives the higher bound; the traffic of the other may fit in.
    """
    needs, carriers = _needs(step, costs), _carriers(costs)
    traffic = [needs.over(each) for each in carriers]
    on_cores = [each.per_byte * carried.total for each, carried in zip(carriers, traffic, strict=True)]
    compute = sum(needs.seconds) + costs.optimizer_s
    parts = [(compute + sum(on_cores), 0.0, 0.0)]
    for each, carried, taken in zip(carriers, traffic, on_cores, strict=True):
        parts.append((compute + taken, *_head_and_tail(needs.seconds, carried, each)))
    link_s = max(carried.total / each.link.bytes_per_s for each, carried in zip(carriers, traffic, strict=True))
    return Bound(*max(parts, key=sum), link_s + costs.optimizer_s, _critical_path(needs, carriers) + costs.optimizer_s)


def _head_and_tail(seconds: list[float], traffic: _Traffic, carrier: _Carrier) -> tuple[float, float]:
    """What nothing hides of a link's traffic, before compute and after it.

    A byte that moves outside of head and tail takes `per_byte` from compute; inside it takes longer, on the link.
    """
    rate, per_byte = carrier.link.bytes_per_s, carrier.per_byte
    tails, sent, after = [0.0], 0, 0.0
    for run_s, nbytes in zip(reversed(seconds), reversed(traffic.leaving), strict=True):
        sent += nbytes
        tails.append(max(tails[-1], sent / rate - after - per_byte * sent))
        after += run_s
    best, head, arrived, before = (0.0, 0.0), 0.0, 0, 0.0
    for index, run_s in enumerate(seconds):
        arrived += traffic.arriving[index]
        head = max(head, arrived / rate - before - per_byte * arrived)
        best = max(best, (head, tails[len(seconds) - index]), key=sum)
        before += run_s
    return best


def _critical_path(needs: _Needs, carriers: Sequence[_Carrier]) -> float:
    """The longest path over runs of compute, each gather before the run that reads it and each reduction after its."""

    def on_links(sent: Sent) -> float:
        return sum(each.nbytes(sent) / each.link.bytes_per_s for each in carriers)

    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_edge("begin", "run 0", weight=0.0)
    for index, seconds in enumerate(needs.seconds):
        graph.add_edge(f"run {index}", f"run {index + 1}", weight=seconds)
        if needs.arriving[index].total:
            graph.add_edge("begin", f"run {index}", weight=on_links(needs.arriving[index]))
        if needs.leaving[index].total:
            graph.add_edge(f"run {index + 1}", "end", weight=on_links(needs.leaving[index]))
    graph.add_edge(f"run {len(needs.seconds)}", "end", weight=on_links(needs.leaving[-1]))
    return float(nx.dag_longest_path_length(graph))


def _needs(step: StepGraph, costs: Costs) -> _Needs:
    """Cut a step into runs of compute at the first reader of each gathered parameter and at each gradient.

    The copies and sums at waits are compute too; they may happen at any time, and belong to the run they stand in.
    """
    if step.sharding.shard_ranks == 1:
        return _Needs([sum(costs.seconds.values())], [NOTHING], [NOTHING])
    arrives, leaves = _first_readers(step), _last_writers(step)
    seconds, arriving, leaving = [0.0], [NOTHING], [NOTHING]
    for node in step.graph.nodes:
        if node in arrives:
            if seconds[-1] or leaving[-1].total:
                seconds.append(0.0)
                arriving.append(NOTHING)
                leaving.append(NOTHING)
            arriving[-1] = arriving[-1].plus(arrives[node])
        seconds[-1] += costs.of(node)
        if node in leaves:
            leaving[-1] = leaving[-1].plus(leaves[node])
            seconds.append(0.0)
            arriving.append(NOTHING)
            leaving.append(NOTHING)
    while len(seconds) > 1 and not (seconds[-1] or arriving[-1].total or leaving[-1].total):
        del seconds[-1], arriving[-1], leaving[-1]
    return _Needs(seconds, arriving, leaving)


def _share(step: StepGraph, fqn: str, start: fx.Node) -> Sent:
    """Bytes that a rank must exchange for one parameter in a collective, without padding."""
    part = step.params[fqn].numel / step.payload_of(start).numel
    return Sent(*(int(part * nbytes) for nbytes in sent_in(step, start)))


def _first_readers(step: StepGraph) -> dict[fx.Node, Sent]:
    """Bytes that must have arrived for each node, by the first node that computes from a gathered parameter."""
    at = step.positions()
    found: dict[fx.Node, Sent] = {}
    for wait in step.nodes(Role.WAIT):
        if not is_gather(started_by(wait)):
            continue
        read = gathered_params(wait)
        for fqn in members(wait):
            readers = [
                user
                for value in (in_memory_of(read[fqn]) if fqn in read else [])
                for user in value.users
                if role(user) is Role.COMPUTE
            ]
            first = min(readers, key=lambda node: at[node], default=None)
            if first is not None:
                found[first] = found.get(first, NOTHING).plus(_share(step, fqn, started_by(wait)))
    return found


def _last_writers(step: StepGraph) -> dict[fx.Node, Sent]:
    """Bytes that can be sent after each node that completes a gradient."""
    found: dict[fx.Node, Sent] = {}
    for start in step.nodes(Role.REDUCE_SCATTER):
        for slot in operands(start):
            found[slot] = _share(step, grad_fqn(slot), start)
    return found
