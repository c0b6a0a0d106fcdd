"""The least time that a step can take on this machine, by what a system does with its gathered parameters.

Three things bound it, each by itself: a rank's one core, which computes and also moves bytes; its link; and that
forward ends no earlier than its own gathers have come, and backward no earlier than its own reductions. What only a
certain choice of buckets costs (the first gather, the last reduction, which nothing hides) is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.network.systems import Policy


@dataclass(frozen=True)
class Costs:
    """What was measured of a machine and its link."""

    compute_s: float
    """A step without communication."""
    forward_s: float
    """The part of it up to the loss."""
    bytes_per_s: float
    """What a link carries, in each direction at once."""
    cpu_s_per_byte: float
    """CPU seconds of a rank for each byte that it sends, while it receives one."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, by when they have to be there."""

    forward: float = 0
    """Needed before forward ends."""
    backward: float = 0
    """There only once forward ended."""
    anywhere: float = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.anywhere

    def at_most(self, total: float) -> Traffic:
        """The same, with less of what may be sent anywhere, where `total` is less."""
        return replace(self, anywhere=max(0.0, min(self.anywhere, total - self.forward - self.backward)))


def least_traffic(policy: Policy, param_bytes: float, world_size: int) -> Traffic:
    """The least bytes that a policy needs.

    Args:
        param_bytes: of the parameters as they travel; gradients have as many.

    A gather and a reduce-scatter each send (world_size - 1) / world_size of the parameters' bytes, and an all-reduce is
    one of each. A second gather may start as early as in forward.
    """
    once = param_bytes * (world_size - 1) / world_size
    if policy is Policy.AGAIN:
        return Traffic(forward=once, backward=once, anywhere=once)
    if policy is Policy.KEEP:
        return Traffic(forward=once, backward=once)
    if policy is Policy.REPLICATED:
        return Traffic(backward=2 * once)
    return Traffic()


def lower_bound_s(costs: Costs, traffic: Traffic) -> float:
    """The least seconds of a step."""
    on_core = costs.compute_s + traffic.total * costs.cpu_s_per_byte
    on_link = traffic.total / costs.bytes_per_s
    phases = ((costs.forward_s, traffic.forward), (costs.compute_s - costs.forward_s, traffic.backward))
    in_phases = sum(
        max(compute_s + sent * costs.cpu_s_per_byte, sent / costs.bytes_per_s) for compute_s, sent in phases
    )
    return max(on_core, on_link, in_phases)
