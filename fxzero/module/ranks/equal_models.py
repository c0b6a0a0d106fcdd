"""A teacher and a student that are equal models are averaged shard by shard: their buckets must be equal too."""

import warnings
import weakref

from fxzero.graph.layout import Layout
from fxzero.module.sharded_model import ShardedModel

_laid_out: list[weakref.ref[ShardedModel]] = []
"""The models whose layout is fixed."""


def compare_with_equal_models(sharded: ShardedModel, layout: Layout) -> None:
    """Warn if a frozen model and a trained one have the same parameters, but other slices of them on a rank."""
    _laid_out[:] = [held for held in _laid_out if held() is not None]
    for held in _laid_out:
        other = held()
        if other is None or other.shards is None or not _are_teacher_and_student(sharded, other):
            continue
        own, theirs = ({bucket.fqns for bucket in each.buckets} for each in (layout, other.shards.layout))
        if own != theirs and layout.shard_ranks > 1:
            differs = min(own - theirs)
            warnings.warn(
                f"This {type(sharded.model).__name__} has the parameters of a model that was compiled before, one of "
                f"the two is frozen, and their buckets differ (that of {differs[0]}): do not average them shard by "
                "shard, since a rank has other elements of each. Compile both with the same options (the argument "
                "passes=default_passes(bucket_bytes=...) fixes sizes), and with all parameters trained or all frozen; "
                "or average zero.state_dict() of both.",
                stacklevel=2,
            )
    _laid_out.append(weakref.ref(sharded))


def _are_teacher_and_student(one: ShardedModel, other: ShardedModel) -> bool:
    specs = [{fqn: (spec.shape, spec.dtype) for fqn, spec in each.specs.items()} for each in (one, other)]
    frozen = [not any(param.requires_grad for param in each.param_list) for each in (one, other)]
    return specs[0] == specs[1] and frozen[0] != frozen[1]
