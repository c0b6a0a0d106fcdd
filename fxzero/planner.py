"""From a traced step to a plan: passes, layout, code. What ranks must agree on is written down here as text.

`plan()` is the entry point for a cluster that is not there; a model that trains comes here through its engine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fxzero.capture import capture
from fxzero.comm.make import backend_for
from fxzero.cost.job_costs import CostModel, choose_sizes, optimizer_bytes
from fxzero.cost.model import Cluster
from fxzero.graph.layout import LayoutName, check_layout
from fxzero.graph.sharding import Placement, Sharding
from fxzero.graph.step import StepGraph
from fxzero.memory.footprint import Held, footprint, held_by
from fxzero.memory.report import MemoryReport
from fxzero.module.optimizer_classes import state_per_element
from fxzero.passes import Pass, default_passes
from fxzero.planning.fix_layout import layout_of
from fxzero.planning.keep_within_budget import choose, must_choose
from fxzero.planning.plan import make_plan
from fxzero.planning.schedule import Schedule
from fxzero.runtime.shards import spec_of

logger = logging.getLogger(__name__)


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
    across: Placement = "replicate",
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
    sharding, device = Sharding.over(world_size, num_nodes, across), torch.device("cpu")
    backend = backend_for(device)
    args, kwargs = as_arguments(example)
    params = {fqn: spec_of(fqn, param) for fqn, param in model.named_parameters()}
    captured = capture(
        model,
        model.forward,
        args,
        kwargs,
        params,
        device=device,
        sharding=sharding,
        with_backward=torch.is_grad_enabled() and any(param.requires_grad for param in params.values()),
    )
    captured.step.layout = layout
    chosen: Sequence[Pass] = default_passes() if passes is None else passes
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    state = state_per_element([] if optimizer is None else [optimizer])

    def held(step: StepGraph) -> Held:
        layout, secondaries = layout_of(step, chosen), step.secondaries().values()
        return held_by(layout, state_per_element=state, buffers=buffers, secondaries=secondaries)

    costs = None
    if cluster is not None:
        costs = CostModel(Cluster.of(cluster), backend, optimizer_bytes(params.values(), sharding.shard_ranks, state))
        if captured.step.has_backward and sharding.shard_ranks > 1 and passes is None:
            chosen = choose_sizes(captured.step, chosen, costs, keeps_free=memory_budget is None).passes(chosen)
    choice = None
    if must_choose(chosen, memory_budget) and captured.step.has_backward:
        choice = choose(captured.step, chosen, backend, held, memory_budget)
    made = make_plan(captured, chosen, choice)
    return Schedule(
        made.step,
        made.code.source,
        lambda: MemoryReport(footprint(made.step, backend, held(made.step)), made.step),
        None if costs is None else partial(costs.timing, made.step),
    )


def as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that an example batch stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}
