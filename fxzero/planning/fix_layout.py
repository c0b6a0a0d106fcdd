"""Which buckets a model has: those of its first plan, or, before any trace, those of the order of registration."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise

from fxzero.graph.layout import Bucket, Layout, LayoutName, ParamSpec, group_into_buckets
from fxzero.graph.names import bucket_label
from fxzero.graph.nodes import Role, members
from fxzero.graph.step import StepGraph
from fxzero.passes import Pass
from fxzero.passes.bucket_all_gathers import BucketAllGathers


def in_layout(step: StepGraph, passes: Sequence[Pass], layout: Layout | None) -> list[Pass]:
    """The passes for a step whose buckets are fixed already; None: they are not."""
    if layout is None:
        return list(passes)
    step.params = {param.fqn: param for param in layout.params}
    fixed = tuple(bucket.fqns for bucket in layout.buckets)
    return [
        dataclasses.replace(pass_, buckets=fixed) if isinstance(pass_, BucketAllGathers) else pass_ for pass_ in passes
    ]


def _bucket_bytes(passes: Sequence[Pass]) -> int:
    """The size of buckets that a list of passes makes; 1 (each parameter alone) if none makes any."""
    return next((pass_.bucket_bytes for pass_ in passes if isinstance(pass_, BucketAllGathers)), 1)


def layout_of(step: StepGraph, passes: Sequence[Pass]) -> Layout:
    """The layout that the buckets of a step ask for; parameters it never gathers get buckets of their own, last."""
    gathered = dict.fromkeys(members(start) for start in step.nodes(Role.ALL_GATHER))
    buckets = [step.bucket(fqns) for fqns in gathered]
    known = {fqn for fqns in gathered for fqn in fqns}
    rest = [param for fqn, param in step.params.items() if fqn not in known]
    others = group_into_buckets(rest, step.sharding.shard_ranks, _bucket_bytes(passes), step.layout)
    return Layout((*buckets, *others), step.sharding.shard_ranks)


def layout_in_registration_order(
    params: Iterable[ParamSpec], shard_ranks: int, passes: Sequence[Pass], layout: LayoutName = "contiguous"
) -> Layout:
    """The layout when shards are needed before anything was traced."""
    return Layout(group_into_buckets(params, shard_ranks, _bucket_bytes(passes), layout), shard_ranks)


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
