"""Which buckets a model has: those of its first plan; before any trace, those that the passes make of its parameters.

Without a trace the passes get a step that reads each parameter once, in the order of registration, which is the order
of execution in most models.
"""

import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph.layout import Bucket, Layout, ParamSpec
from fxzero.graph.names import bucket_label
from fxzero.graph.nodes import META_KEY, NodeInfo, Role, members
from fxzero.graph.recipe import Recipe
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import Pass, StepGraph
from fxzero.passes import default_passes


def layout_of(step: StepGraph, recipe: Recipe, passes: Sequence[Pass] | None = None) -> Layout:
    """The layout that the buckets of a planned step ask for; parameters it never gathers get others, behind them.

    Args:
        passes: those that the step was planned with, if they are not the recipe's.
    """
    gathered = dict.fromkeys(members(start) for start in step.nodes(Role.ALL_GATHER))
    known = {fqn for fqns in gathered for fqn in fqns}
    rest = [param for fqn, param in step.params.items() if fqn not in known]
    others = layout_in_registration_order(rest, step.sharding, recipe, passes).buckets if rest else ()
    return Layout((*(step.bucket(fqns) for fqns in gathered), *others), step.sharding.shard_ranks)


def layout_in_registration_order(
    params: Iterable[ParamSpec], sharding: Sharding, recipe: Recipe, passes: Sequence[Pass] | None = None
) -> Layout:
    """The layout when shards are needed before anything was traced.

    Args:
        passes: those that steps will be planned with, if they are not the recipe's.
    """
    step = _reading(list(params), sharding).under(recipe)
    for each in default_passes(recipe) if passes is None else passes:
        each(step)
    buckets = dict.fromkeys(step.bucket_of(start) for start in step.nodes(Role.ALL_GATHER))
    known = {fqn for bucket in buckets for fqn in bucket.fqns}
    alone = (step.bucket((fqn,)) for fqn in step.params if fqn not in known)
    return Layout((*buckets, *alone), sharding.shard_ranks)


def _reading(params: Sequence[ParamSpec], sharding: Sharding) -> StepGraph:
    """A forward step that reads each parameter once."""
    graph = torch_internals.PlainGraph()
    placeholders: list[fx.Node] = []
    for index, param in enumerate(params):
        node = graph.placeholder(f"param_{index}")
        value = torch.empty(param.shape, dtype=param.dtypes.compute, device="meta")
        node.meta.update({META_KEY: NodeInfo(Role.PARAM, param.fqn), "val": value})
        placeholders.append(node)
    for node in placeholders:
        reader = graph.call_function(torch.ops.aten.clone.default, (node,))
        reader.meta.update({META_KEY: NodeInfo(Role.COMPUTE), "val": node.meta["val"]})
    graph.output(())
    step = StepGraph(graph, {param.fqn: param for param in params}, sharding)
    step.set_output([], {}, [])
    return step


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
    late = sum(bucket.gathered.nbytes for bucket in interleaved)
    total = sum(bucket.gathered.nbytes for bucket in laid_out)
    if total and late > total // 4:
        warnings.warn(
            f"The layout was fixed before the first trace, in registration order; {len(interleaved)} of "
            f"{len(laid_out)} buckets (from {bucket_label(interleaved[0].fqns)}) are used in another order, which "
            "costs overlap. Pass example= to fxzero.compile, or call the module before loading weights.",
            stacklevel=2,
        )
