"""From a traced step to what is chosen from costs: the cost model of one training job, and the trials it is used in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fxzero.comm.backend import Backend
from fxzero.cost.choose_sizes import needs_of, tune
from fxzero.cost.measured import with_measured
from fxzero.cost.model import Cluster, Costs, roofline
from fxzero.cost.report import Timing
from fxzero.graph.layout import ParamSpec
from fxzero.graph.recipe import Recipe
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import WireFormat, gather_format
from fxzero.host.gc_pause import gc_paused


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


def choose_sizes(gathering: StepGraph, recipe: Recipe, model: CostModel, *, keeps_free: bool) -> Recipe:
    """The recipe with the sizes and the order that are predicted to be fastest.

    Args:
        gathering: a step that has its collectives: one for each parameter, before they are bucketed, or a complete plan
            whose compute was measured.
        keeps_free: buckets may stay gathered from forward to backward where that costs no memory at the peak.
    """
    gathered_as = None if recipe.gather_dtype is None else gather_format(recipe.gather_dtype)
    reduced_as = None if recipe.reduce_dtype is None else WireFormat(recipe.reduce_dtype)
    with gc_paused():
        needs = needs_of(gathering, model(gathering), model.cluster.device, model.backend, gathered_as, reduced_as)
        return tune(needs, recipe, keeps_free=keeps_free)


def optimizer_bytes(params: Iterable[ParamSpec], shard_ranks: int, state_numel: int) -> int:
    """Bytes that an optimizer reads and writes in a step of one rank: parameters, gradients and state.

    Args:
        state_numel: elements of state for each element of a parameter.
    """
    return sum(param.nbytes for param in params) // shard_ranks * (3 + 2 * state_numel)
