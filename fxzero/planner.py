"""From a traced step to a plan: passes, layout, code. What ranks must agree on is written down here as text.

`plan()` is the entry point for a cluster that is not there; a model that trains comes here through its engine.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fxzero.capture import Captured, capture
from fxzero.comm.without_ranks import PlanningComm, ShardedPlanningComm
from fxzero.cost.job_costs import CostModel, choose_sizes, optimizer_bytes
from fxzero.cost.model import Cluster
from fxzero.graph.layout import Bucket, Layout, LayoutName, ParamSpec, check_layout, group_into_buckets
from fxzero.graph.names import bucket_label
from fxzero.graph.stages import Across, check_across
from fxzero.graph.step import Role, StepGraph, members
from fxzero.graph.verify import verify_plan
from fxzero.host.gc_pause import collector_paused
from fxzero.memory.footprint import Held, footprint, held_by
from fxzero.memory.report import MemoryReport
from fxzero.module.optimizer_guard import state_per_element
from fxzero.passes import BucketAllGathers, Pass, default_passes
from fxzero.planning.codegen import generate
from fxzero.planning.keep_within_budget import Choice, choose, must_choose
from fxzero.planning.run_passes import Observer, run_passes
from fxzero.planning.schedule import Schedule
from fxzero.runtime.executable import Plan
from fxzero.runtime.shards import spec_of

logger = logging.getLogger(__name__)


def make_plan(
    captured: Captured, passes: Sequence[Pass], choice: Choice | None = None, observers: Sequence[Observer] = ()
) -> Plan:
    """Run the passes over a captured step, prove the whole plan, and write the code.

    Args:
        choice: what a memory budget decided.

    Raises:
        ScheduleError: a pass left the schedule unsafe, or all of them left it incomplete.
    """
    with collector_paused():
        run_passes(captured.step, passes if choice is None else choice.passes(passes), observers=observers)
        verify_plan(captured.step)
        return Plan(captured, generate(captured.step))


def in_layout(step: StepGraph, passes: Sequence[Pass], layout: Layout | None) -> list[Pass]:
    """The passes for a step whose buckets are fixed already; None: they are not."""
    if layout is None:
        return list(passes)
    step.params = {param.fqn: param for param in layout.params}
    fixed = tuple(bucket.fqns for bucket in layout.buckets)
    return [
        dataclasses.replace(pass_, buckets=fixed) if isinstance(pass_, BucketAllGathers) else pass_ for pass_ in passes
    ]


def plan(
    model: nn.Module,
    example: Any,
    *,
    world_size: int,
    passes: Sequence[Pass] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    memory_budget: int | None = None,
    layout: LayoutName = "contiguous",
    cluster: Cluster | str | None = None,
    num_nodes: int = 1,
    across: Across = "replicate",
) -> Schedule:
    """The schedule of a model on ranks that are not there: no process group, no device, no memory for any tensor.

    The model is only read, and traced as on the CPU. Under `torch.no_grad()` the step is forward only.

    Args:
        model: on any device, also meta.
        example: one batch, as `fxzero.compile` takes it; its tensors may be on meta.
        world_size: the number of ranks.
        passes: the compiler passes, in order. Default: `fxzero.passes.default_passes()`.
        optimizer: what would train the model, for the bytes of its state. Default: one like AdamW.
        memory_budget: bytes that a rank may use; what fits stays gathered.
        layout: "contiguous" or "interleaved", as of `fxzero.compile`.
        cluster: what the ranks are and what joins them: numbers, or a name of `fxzero.cost.CLUSTERS`. With it, sizes
            and order are chosen from costs, unless passes are given, and `schedule.timing` predicts the step.
        num_nodes: over which the ranks are spread evenly, as on a 2-D mesh of (num_nodes, world_size // num_nodes).
        across: what nodes are to each other, as of `fxzero.compile`.

    Raises:
        CaptureError: the model cannot be traced.
        ScheduleError: a pass left the schedule unsafe.
        PlanError: the step needs more than memory_budget.
        ValueError: another layout or relation of nodes, or num_nodes does not divide world_size.
    """
    check_layout(layout)
    comm = _planning_comm(world_size, num_nodes, across)
    args, kwargs = as_arguments(example)
    params = {fqn: spec_of(fqn, param) for fqn, param in model.named_parameters()}
    captured = capture(
        model,
        model.forward,
        args,
        kwargs,
        params,
        device=torch.device("cpu"),
        world_size=comm.world_size,
        with_backward=torch.is_grad_enabled() and any(param.requires_grad for param in params.values()),
    )
    captured.step.layout = layout
    captured.step.num_nodes, captured.step.shards_across = comm.num_nodes, comm.shards_across
    chosen: Sequence[Pass] = default_passes() if passes is None else passes
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    state = state_per_element([] if optimizer is None else [optimizer])

    def held(step: StepGraph) -> Held:
        layout, secondaries = layout_of(step, chosen), step.secondaries().values()
        return held_by(layout, state_per_element=state, buffers=buffers, secondaries=secondaries)

    costs = None
    if cluster is not None:
        costs = CostModel(Cluster.of(cluster), optimizer_bytes(params.values(), comm.world_size, state))
        if captured.step.has_backward and comm.world_size > 1 and passes is None:
            chosen = choose_sizes(captured.step, chosen, costs, keeps_free=memory_budget is None).passes(chosen)
    choice = None
    if must_choose(chosen, memory_budget) and captured.step.has_backward:
        choice = choose(captured.step, chosen, comm, held, memory_budget)
    made = make_plan(captured, chosen, choice)
    return Schedule(
        made.step,
        made.code.source,
        lambda: MemoryReport(footprint(made.step, comm, held(made.step)), made.step),
        None if costs is None else partial(costs.timing, made.step),
    )


def _planning_comm(world_size: int, num_nodes: int, across: Across) -> PlanningComm:
    """A rank that is not there; as of `mesh.group_of_mesh`, nodes of one rank that share shards are one group."""
    check_across(across)
    if num_nodes < 1 or world_size % num_nodes:
        raise ValueError(f"num_nodes is {num_nodes}; it must divide the world_size of {world_size}")
    if across == "replicate":
        return PlanningComm(0, world_size // num_nodes, num_nodes=num_nodes)
    if num_nodes in (1, world_size):
        return PlanningComm(0, world_size)
    return ShardedPlanningComm(0, world_size, num_nodes=num_nodes)


def as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that an example batch stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def _bucket_bytes(passes: Sequence[Pass]) -> int:
    """The size of buckets that a list of passes makes; 1 (each parameter alone) if none makes any."""
    return next((pass_.bucket_bytes for pass_ in passes if isinstance(pass_, BucketAllGathers)), 1)


def layout_of(step: StepGraph, passes: Sequence[Pass]) -> Layout:
    """The layout that the buckets of a step ask for; parameters it never gathers get buckets of their own, last."""
    gathered = dict.fromkeys(members(start) for start in step.nodes(Role.ALL_GATHER))
    buckets = [step.bucket(fqns) for fqns in gathered]
    known = {fqn for fqns in gathered for fqn in fqns}
    rest = [param for fqn, param in step.params.items() if fqn not in known]
    others = group_into_buckets(rest, step.world_size, _bucket_bytes(passes), step.layout)
    return Layout((*buckets, *others), step.world_size)


def layout_in_registration_order(
    params: Iterable[ParamSpec], world_size: int, passes: Sequence[Pass], layout: LayoutName = "contiguous"
) -> Layout:
    """The layout when shards are needed before anything was traced."""
    return Layout(group_into_buckets(params, world_size, _bucket_bytes(passes), layout), world_size)


def warn_if_out_of_order(step: StepGraph, layout: Layout) -> None:
    """Warn where a layout fixed without a trace gathers much of the model earlier than it is used."""
    order: dict[Bucket, None] = {}
    interleaved: list[Bucket] = []
    for start in step.nodes(Role.ALL_GATHER):
        order.setdefault(step.bucket_of(start))
    position = {bucket.fqns: index for index, bucket in enumerate(order)}
    laid_out = [bucket for bucket in layout.buckets if bucket.fqns in position]
    for before, after in pairwise(laid_out):
        if position[after.fqns] < position[before.fqns]:
            interleaved.append(after)
    late = sum(bucket.nbytes for bucket in interleaved)
    total = sum(bucket.nbytes for bucket in laid_out)
    if total and late > total // 4:
        warnings.warn(
            f"The layout was fixed before the first trace, in registration order; {len(interleaved)} of "
            f"{len(laid_out)} buckets (from {bucket_label(interleaved[0].fqns)}) are used in another order, which "
            "costs overlap. Pass example= to fxzero.compile, or call the module before loading weights.",
            stacklevel=2,
        )


def describe_layout(layout: Layout, options: Mapping[str, object]) -> list[str]:
    """What every rank must have in common before a parameter is exchanged, one fact a line."""
    lines = [f"world size: {layout.world_size}", *describe_options(options)]
    for index, bucket in enumerate(layout.buckets):
        lines += [f"{line}, bucket {index}" for line in describe_params(bucket.params)]
    return lines


def describe_options(options: Mapping[str, object]) -> list[str]:
    """One option a line."""
    return [f"option {name}: {value}" for name, value in options.items()]


def describe_params(params: Iterable[ParamSpec]) -> list[str]:
    """One parameter a line."""
    return [
        f"parameter {param.fqn}: {param.dtype} {'x'.join(map(str, param.shape)) or 'scalar'} "
        f"{'trained' if param.requires_grad else 'frozen'}"
        for param in params
    ]
