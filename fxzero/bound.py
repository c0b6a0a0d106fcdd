"""A lower bound on the time of a step: no order of its collectives, and no buckets, can be faster for these costs.

busy        all compute, and what traffic takes from it where it shares the cores
head, tail  before the reader of a parameter runs, everything up to it must have arrived; after a gradient is ready,
            it and all later ones must be sent. Where that takes longer than the compute there, nothing hides the rest.
link        all bytes, one message after another
path        the longest chain of one gather, compute, and one reduction

    |--- head ---|------------- busy -------------|-- tail --|

With an overlapped optimizer, its step hides the tail as any other compute does, and follows a reduction nowhere.

Messages are single parameters, without latency, so the bound holds for every choice of buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch import fx

from fxzero.aliasing import in_memory_of
from fxzero.cost import Costs
from fxzero.ir import Role, StepGraph, gathered_params, grad_fqn, is_gather, members, operands, role, started_by
from fxzero.schedule import across_bytes, inside_bytes


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
    arriving: list[int]
    leaving: list[int]


def lower_bound(step: StepGraph, costs: Costs) -> Bound:
    """The bound for a complete plan: what it gathers and keeps stays, all else may be in any order."""
    needs, rate = _needs(step, costs), costs.link.bytes_per_s
    per_byte = min(costs.link.cpu_s_per_byte, 1.0 / rate)
    total, compute = sum(needs.arriving) + sum(needs.leaving), sum(needs.seconds)
    # A byte that moves outside of head and tail takes `per_byte` from compute; inside it takes longer, on the link.
    hiding_s = costs.optimizer_s if step.overlaps_optimizer else 0.0
    last_s = costs.optimizer_s - hiding_s
    tails, sent, after = [0.0], 0, hiding_s
    for seconds, nbytes in zip(reversed(needs.seconds), reversed(needs.leaving), strict=True):
        sent += nbytes
        tails.append(max(tails[-1], sent / rate - after - per_byte * sent))
        after += seconds
    best, head, arrived, before = (0.0, 0.0), 0.0, 0, 0.0
    for index, seconds in enumerate(needs.seconds):
        arrived += needs.arriving[index]
        head = max(head, arrived / rate - before - per_byte * arrived)
        best = max(best, (head, tails[len(needs.seconds) - index]), key=sum)
        before += seconds
    return Bound(
        compute + per_byte * total + costs.optimizer_s,
        *best,
        total / rate + last_s,
        _critical_path(needs, rate, hiding_s) + last_s,
    )


def _critical_path(needs: _Needs, rate: float, hiding_s: float) -> float:
    """The longest path over runs of compute, each gather before the run that reads it and each reduction after its.

    Args:
        hiding_s: compute after the last run that no reduction must precede.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_edge("begin", "run 0", weight=0.0)
    for index, seconds in enumerate(needs.seconds):
        graph.add_edge(f"run {index}", f"run {index + 1}", weight=seconds)
        if needs.arriving[index]:
            graph.add_edge("begin", f"run {index}", weight=needs.arriving[index] / rate)
        if needs.leaving[index]:
            graph.add_edge(f"run {index + 1}", "end", weight=needs.leaving[index] / rate)
    last = f"run {len(needs.seconds)}"
    graph.add_edge(last, "end", weight=max(hiding_s, needs.leaving[-1] / rate))
    return float(nx.dag_longest_path_length(graph))


def _needs(step: StepGraph, costs: Costs) -> _Needs:
    """Cut a step into runs of compute at the first reader of each gathered parameter and at each gradient.

    The copies and sums at waits are compute too; they may happen at any time, and belong to the run they stand in.
    """
    if step.world_size == 1:
        return _Needs([sum(costs.seconds.values())], [0], [0])
    arrives, leaves = _first_readers(step), _last_writers(step)
    seconds, arriving, leaving = [0.0], [0], [0]
    for node in step.graph.nodes:
        if node in arrives:
            if seconds[-1] or leaving[-1]:
                seconds.append(0.0)
                arriving.append(0)
                leaving.append(0)
            arriving[-1] += arrives[node]
        seconds[-1] += costs.of(node)
        if node in leaves:
            leaving[-1] += leaves[node]
            seconds.append(0.0)
            arriving.append(0)
            leaving.append(0)
    while len(seconds) > 1 and not (seconds[-1] or arriving[-1] or leaving[-1]):
        del seconds[-1], arriving[-1], leaving[-1]
    return _Needs(seconds, arriving, leaving)


def _share(step: StepGraph, fqn: str, start: fx.Node) -> int:
    """Bytes that a rank must exchange for one parameter in a collective, without padding."""
    moved = inside_bytes(step, start) + across_bytes(step, start)
    return int(step.params[fqn].nbytes * moved / step.bucket_of(start).nbytes)


def _first_readers(step: StepGraph) -> dict[fx.Node, int]:
    """Bytes that must have arrived for each node, by the first node that computes from a gathered parameter."""
    at = step.positions()
    found: dict[fx.Node, int] = {}
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
                found[first] = found.get(first, 0) + _share(step, fqn, started_by(wait))
    return found


def _last_writers(step: StepGraph) -> dict[fx.Node, int]:
    """Bytes that can be sent after each node that completes a gradient."""
    found: dict[fx.Node, int] = {}
    for start in step.nodes(Role.REDUCE_SCATTER):
        for slot in operands(start):
            found[slot] = _share(step, grad_fqn(slot), start)
    return found
