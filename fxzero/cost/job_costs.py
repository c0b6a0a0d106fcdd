"""From a traced step to what is chosen from costs: the cost model of one training job, and the trials it is used in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fxzero.comm.backend import Backend
from fxzero.cost.choose_sizes import Tuning, needs_of, tune
from fxzero.cost.measured import with_measured
from fxzero.cost.model import Cluster, Costs, roofline
from fxzero.cost.report import Timing
from fxzero.graph.layout import ParamSpec
from fxzero.graph.step import StepGraph, copy_of
from fxzero.host.gc_pause import gc_paused
from fxzero.passes import BucketAllGathers, KeepGathered, NarrowAllGathers, NarrowReduceScatters, Pass


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


def choose_sizes(
    captured: StepGraph,
    passes: Sequence[Pass],
    model: CostModel,
    keeps_free: bool,
    buckets: Sequence[tuple[str, ...]] | None = None,
) -> Tuning:
    """Choose everything for a captured step, which stays as it is.

    Args:
        keeps_free: buckets may stay gathered from forward to backward where that costs no memory at the peak.
        buckets: their members, if the layout is fixed already.
    """
    place = next((i for i, each in enumerate(passes) if isinstance(each, BucketAllGathers)), len(passes))
    with gc_paused():
        return choose_again(_after(captured, passes[:place]), passes, model, keeps_free, buckets)


def choose_again(
    planned: StepGraph,
    passes: Sequence[Pass],
    model: CostModel,
    keeps_free: bool,
    buckets: Sequence[tuple[str, ...]] | None,
) -> Tuning:
    """The same for a step that has its collectives, bucketed or not: a complete plan, whose compute was measured."""
    keeps_all = any(isinstance(each, KeepGathered) and each.max_kept_bytes is None for each in passes)
    gathered_as = next((each.format for each in passes if isinstance(each, NarrowAllGathers)), None)
    reduced_as = next((each.format for each in passes if isinstance(each, NarrowReduceScatters)), None)
    with gc_paused():
        needs = needs_of(planned, model(planned), model.cluster.device, model.backend, gathered_as, reduced_as)
        return tune(needs, keeps_all=keeps_all, keeps_free=keeps_free, buckets=buckets)


def _after(captured: StepGraph, passes: Sequence[Pass]) -> StepGraph:
    """What some passes make of a step, unverified: a trial."""
    step = copy_of(captured)
    for each in passes:
        each(step)
    return step


def optimizer_bytes(params: Iterable[ParamSpec], shard_ranks: int, state_numel: int) -> int:
    """Bytes that an optimizer reads and writes in a step of one rank: parameters, gradients and state.

    Args:
        state_numel: elements of state for each element of a parameter.
    """
    return sum(param.nbytes for param in params) // shard_ranks * (3 + 2 * state_numel)
