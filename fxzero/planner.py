"""Plans of ranks that are not there, and what differs between two plans.

`plan()` is the entry point for a cluster that is not there; the plans of a model that trains are made by its engine.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxzero.capture import capture
from fxzero.capture.islands.marks import Islands
from fxzero.comm.make import backend_for
from fxzero.cost.choose_sizes import choose_sizes
from fxzero.cost.job_costs import CostModel, optimizer_bytes
from fxzero.cost.model import Cluster
from fxzero.graph.devices import Devices
from fxzero.graph.layout import LayoutName
from fxzero.graph.recipe import Recipe
from fxzero.graph.sharding import Placement, Sharding
from fxzero.graph.step import Pass, StepGraph
from fxzero.memory.footprint import Held, held_by
from fxzero.module.precision import Precision, choose_precision
from fxzero.optimizers.classes import state_per_element
from fxzero.planning.check_passes import pass_checks
from fxzero.planning.fix_layout import layout_of
from fxzero.planning.keep_within_budget import depends_on_inputs, fit_recipe
from fxzero.planning.plan import make_plan, recipe_of, with_collectives
from fxzero.planning.saved_plan import SavedPlan, diff
from fxzero.planning.schedule import Schedule
from fxzero.runtime.shards import spec_of

if TYPE_CHECKING:  # its import takes a second, and a user who has a policy has imported it
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["Recipe", "SavedPlan", "as_arguments", "diff", "plan"]


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
    accumulate: int = 1,
    mp_policy: "MixedPrecisionPolicy | Mapping[str, MixedPrecisionPolicy] | None" = None,
) -> Schedule:
    """The schedule of a model on ranks that are not there: no process group, no device, no memory for any tensor.

    The model is only read, and traced as on the CPU. Under `torch.no_grad()` the step is forward only.

    Args:
        model: on any device, also meta.
        example: one batch, as `fxzero.compile` takes it; its tensors may be on meta.
        world_size: the number of ranks.
        passes: the compiler passes, in order; default: `default_passes()`.
        optimizer: what would train the model, for the bytes of its state. Default: one like AdamW.
        memory_budget: bytes that a rank may use; what fits stays gathered.
        layout: "contiguous" or "interleaved", as of `fxzero.compile`.
        cluster: what the ranks are and what joins them: numbers, or a name of `fxzero.cost.CLUSTERS`. With it, sizes
            and order are chosen from costs, unless passes are given, and `schedule.timing` predicts the step.
        num_nodes: over which the ranks are spread evenly, as on a 2-D mesh of (num_nodes, world_size // num_nodes).
        across: what nodes are to each other, as of `fxzero.compile`.
        accumulate: the number of micro-batches of one step of the optimizer, as of `fxzero.compile`. The schedule is
            that of a micro-batch which reduces gradients.
        mp_policy: the dtypes of compute and of sums, as of `fxzero.compile`.

    Raises:
        CaptureError: the model cannot be traced.
        ScheduleError: a pass left the schedule unsafe.
        PlanError: the step needs more than memory_budget.
        TypeError: mp_policy is neither a policy nor a mapping of such.
        ValueError: another layout or relation of nodes, num_nodes does not divide world_size, mp_policy fits neither
            the model nor another option, or there is a memory_budget for a list of passes that `default_passes()` did
            not make.
    """
    start, own_list = recipe_of(passes, memory_budget)
    sharding, devices = Sharding.over(world_size, num_nodes, across), Devices.all(torch.device("cpu"))
    chosen = replace(start, layout=layout)
    if accumulate != 1:
        chosen = replace(chosen, accumulate=accumulate)
    if sharding.is_alone:
        chosen = replace(chosen, unsharded=False)
    args, kwargs = as_arguments(example)
    precision, backend = choose_precision(mp_policy, chosen), backend_for(devices.compute)
    roles = precision.roles(model, backend, sharding)
    params = {fqn: spec_of(fqn, param, roles.get(fqn)) for fqn, param in model.named_parameters()}
    with _casting(precision, model):
        captured = capture(
            model,
            model.forward,
            args,
            kwargs,
            params,
            device=devices.compute,
            sharding=sharding,
            with_backward=torch.is_grad_enabled() and any(param.requires_grad for param in params.values()),
            islands=Islands(model, None),
        )
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    state = state_per_element([] if optimizer is None else [optimizer])

    def held(step: StepGraph) -> Held:
        layout, secondaries = layout_of(step, chosen, own_list), step.secondaries().values()
        return held_by(
            layout,
            devices,
            state_per_element=state,
            buffers=buffers,
            secondaries=secondaries,
            unsharded=step.needs_unsharded,
        )

    costs = None
    is_trained = captured.step.has_backward and own_list is None
    if cluster is not None:
        nbytes = optimizer_bytes(params.values(), sharding.shard_ranks, state)
        costs = CostModel(Cluster.of(cluster), backend, nbytes)
        if is_trained and passes is None and sharding.shard_ranks > 1:
            gathering = with_collectives(captured.step, chosen)
            chosen = choose_sizes(gathering, chosen, costs, keeps_free=memory_budget is None)
    if is_trained and depends_on_inputs(chosen, memory_budget):
        chosen = fit_recipe(captured.step, chosen, backend, held, memory_budget)
    made = make_plan(captured, chosen, backend, devices, own_list, partial(pass_checks, model, args, kwargs))
    timing = None if costs is None else partial(costs.timing, made.step)
    return Schedule(made, lambda: made.report(held(made.step)), timing)


@contextmanager
def _casting(precision: Precision, model: nn.Module) -> Generator[None]:
    """Let modules cast their inputs and outputs as the policy says inside of the block."""
    handles = precision.install(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that an example batch stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}
