"""A lower bound on the time of a step: no order of its collectives, and no buckets, can be faster for these costs.

busy        all compute, and what traffic takes from it where it shares the cores
head, tail  before the reader of a parameter runs, everything up to it must have arrived; after a gradient is ready,
            it and all later ones must be sent. Where that takes longer than the compute there, nothing hides the rest.
link        all bytes, one message after another; of two links, those of the slower
path        the longest chain of one gather, compute, and one reduction

    |--- head ---|------------- busy -------------|-- tail --|

Messages are single parameters, without latency, so the bound holds for every choice of buckets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from torch import fx

from fxzero.cost.model import Costs, Link
from fxzero.graph.aliasing import in_memory_of
from fxzero.graph.nodes import Role, gathered_params, grad_fqn, is_gather, operands, role, started_by
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
    def _parts(self) -> dict[str, float]:
        compute_s = self.busy_s + self.head_s + self.tail_s
        return {"compute": compute_s, "communication": self.link_s, "critical path": self.path_s}

    @property
    def step_s(self) -> float:
        return max(self._parts.values())

    @property
    def limit(self) -> str:
        """The name of the largest part."""
        return max(self._parts, key=self._parts.__getitem__)


@dataclass
class _Run:
    """Compute between two points at which bytes must have arrived or can be sent."""

    seconds: float = 0.0
    arriving: Sent = NOTHING
    """Bytes that must have arrived before it."""
    leaving: Sent = NOTHING
    """Bytes that can be sent after it."""


class _Carrier(NamedTuple):
    """A link, and the bytes of each run that it carries."""

    link: Link
    arriving: list[int]
    leaving: list[int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.arriving) + sum(self.leaving)

    @property
    def per_byte(self) -> float:
        """Seconds that a byte takes from compute."""
        return min(self.link.cpu_s_per_byte, 1.0 / self.link.bytes_per_s)


def _carriers(runs: Sequence[_Run], costs: Costs) -> list[_Carrier]:
    """The links of a rank: one for all bytes, or one to other nodes and one inside its own."""
    if costs.inside is None:
        links = [(costs.link, attrgetter("total"))]
    else:
        links = [(costs.link, attrgetter("across")), (costs.inside, attrgetter("inside"))]
    return [
        _Carrier(link, [nbytes(run.arriving) for run in runs], [nbytes(run.leaving) for run in runs])
        for link, nbytes in links
    ]


def lower_bound(step: StepGraph, costs: Costs) -> Bound:
    """The bound for a complete plan: what it gathers and keeps stays, all else may be in any order.

    Of two links, head and tail are those of the one that gives the higher bound; the traffic of the other may fit in.
    """
    runs = _runs(step, costs)
    carriers = _carriers(runs, costs)
    on_cores = [each.per_byte * each.total for each in carriers]
    compute = sum(run.seconds for run in runs) + costs.optimizer_s
    parts = [(compute + sum(on_cores), 0.0, 0.0)]
    for each, taken in zip(carriers, on_cores, strict=True):
        parts.append((compute + taken, *_head_and_tail(runs, each)))
    link_s = max(each.total / each.link.bytes_per_s for each in carriers)
    return Bound(*max(parts, key=sum), link_s + costs.optimizer_s, _critical_path(runs, carriers) + costs.optimizer_s)


def _head_and_tail(runs: Sequence[_Run], carrier: _Carrier) -> tuple[float, float]:
    """Seconds of a link's traffic that nothing hides, before compute and after it.

    A byte that moves outside of head and tail takes `per_byte` from compute; inside it takes longer, on the link.
    """
    rate, per_byte = carrier.link.bytes_per_s, carrier.per_byte
    tails, sent, after = [0.0], 0, 0.0
    for run, nbytes in zip(reversed(runs), reversed(carrier.leaving), strict=True):
        sent += nbytes
        tails.append(max(tails[-1], sent / rate - after - per_byte * sent))
        after += run.seconds
    best, head, arrived, before = (0.0, 0.0), 0.0, 0, 0.0
    for index, run in enumerate(runs):
        arrived += carrier.arriving[index]
        head = max(head, arrived / rate - before - per_byte * arrived)
        best = max(best, (head, tails[len(runs) - index]), key=sum)
        before += run.seconds
    return best


def _critical_path(runs: Sequence[_Run], carriers: Sequence[_Carrier]) -> float:
    """The longest path over runs of compute, each gather before the run that reads it and each reduction after its."""
    elapsed = longest = 0.0
    for index, run in enumerate(runs):
        arrived = sum(each.arriving[index] / each.link.bytes_per_s for each in carriers)
        elapsed = max(elapsed, arrived) + run.seconds
        longest = max(longest, elapsed + sum(each.leaving[index] / each.link.bytes_per_s for each in carriers))
    return longest


def _runs(step: StepGraph, costs: Costs) -> list[_Run]:
    """Cut a step into runs of compute at the first reader of each gathered parameter and at each gradient.

    The copies and sums at waits are compute too; they may happen at any time, and belong to the run they stand in.
    """
    if step.sharding.shard_ranks == 1:
        return [_Run(sum(costs.seconds.values()))]
    arrives, leaves = _first_readers(step), _last_writers(step)
    runs = [_Run()]
    for node in step.graph.nodes:
        if node in arrives:
            if runs[-1].seconds or runs[-1].leaving.total:
                runs.append(_Run())
            runs[-1].arriving = runs[-1].arriving.plus(arrives[node])
        runs[-1].seconds += costs.of(node)
        if node in leaves:
            runs[-1].leaving = leaves[node]
            runs.append(_Run())
    while len(runs) > 1 and runs[-1] == _Run():
        del runs[-1]
    return runs


def parameter_readers(step: StepGraph) -> Iterator[tuple[fx.Node, str, list[fx.Node]]]:
    """The start of each gather, with each of its parameters and the nodes that read it, through views of it."""
    for wait in step.nodes(Role.WAIT):
        if is_gather(wait):
            for fqn, param in gathered_params(wait).items():
                yield started_by(wait), fqn, [user for value in in_memory_of(param) for user in value.users]


def _share(step: StepGraph, fqn: str, start: fx.Node) -> Sent:
    """Bytes that a rank must exchange for one parameter in a collective, without padding."""
    part = step.params[fqn].numel / step.payload_of(start).numel
    return Sent(*(int(part * nbytes) for nbytes in sent_in(step, start)))


def _first_readers(step: StepGraph) -> dict[fx.Node, Sent]:
    """Bytes that must have arrived for each node, by the first node that computes from a gathered parameter."""
    at = step.positions()
    found: dict[fx.Node, Sent] = {}
    for start, fqn, readers in parameter_readers(step):
        computing = [node for node in readers if role(node) is Role.COMPUTE]
        if computing:
            first = min(computing, key=at.__getitem__)
            found[first] = found.get(first, NOTHING).plus(_share(step, fqn, start))
    return found


def _last_writers(step: StepGraph) -> dict[fx.Node, Sent]:
    """Bytes that can be sent after each node that completes a gradient."""
    found: dict[fx.Node, Sent] = {}
    for start in step.nodes(Role.REDUCE_SCATTER):
        for slot in operands(start):
            found[slot] = _share(step, grad_fqn(slot), start)
    return found
