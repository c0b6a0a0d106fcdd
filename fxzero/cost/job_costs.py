"""From a traced step to what is chosen from costs: the cost model of one training job, and the trials it is used in."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from fxzero.comm.backend import Backend
from fxzero.cost.measured import with_measured
from fxzero.cost.model import Cluster, Costs, roofline
from fxzero.cost.report import Timing
from fxzero.graph.layout import ParamSpec
from fxzero.graph.step import StepGraph


@dataclass(frozen=True)
class CostModel:
    """The costs of any step of one model on one cluster."""

    cluster: Cluster
    backend: Backend
    optimizer_bytes: int = 0
    by_name: dict[str, float] = field(default_factory=dict[str, float])
    """Measured seconds of nodes; empty: all are estimated."""
    optimizer_s: float = 0.0
    cpu_s_per_byte: float = 0.0
    """Of threads other than the one whose seconds were measured."""

    def __call__(self, step: StepGraph) -> Costs:
        estimated = roofline(step, self.cluster, self.backend, optimizer_bytes=self.optimizer_bytes)
        if not self.by_name:
            return estimated
        optimizer_s = self.optimizer_s or estimated.optimizer_s
        return with_measured(step, estimated, self.by_name, optimizer_s, self.cpu_s_per_byte)

    def timing(self, step: StepGraph) -> Timing:
        """The prediction for a complete plan."""
        return Timing.of(step, self(step))


def optimizer_bytes(params: Iterable[ParamSpec], shard_ranks: int, state_numel: int) -> int:
    """Bytes that an optimizer reads and writes in a step of one rank: parameters, gradients and state.

    Those of the copies that compute reads, made anew behind it, are among them.

    Args:
        state_numel: elements of state for each element of a parameter.
    """
    params = list(params)
    copied = sum(param.nbytes + param.gathered_nbytes for param in params if param.dtypes.has_copy)
    return sum(param.nbytes for param in params) // shard_ranks * (3 + 2 * state_numel) + copied // shard_ranks
