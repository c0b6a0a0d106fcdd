"""One all-gather per bucket instead of one per parameter."""

import operator
from dataclasses import dataclass

from torch import fx

from fxzero.errors import PassOrderError
from fxzero.graph import ops
from fxzero.graph.layout import group_into_buckets
from fxzero.graph.nodes import Role, gathered_params, is_inside, members, new_value, wait_of, wire_format
from fxzero.graph.step import StepGraph

MIB = 2**20


@dataclass(frozen=True)
class BucketAllGathers:
    """Merge the gathers of neighbours in execution order into one collective per bucket and phase.

    Before:  all_gather w | wait w | mm(x, w) | all_gather b | wait b | add(.., b)
    After:   all_gather (w, b) | wait (w, b) | mm(x, w) | add(.., b)

    A bucket never mixes dtypes or frozen with trained parameters, and has the same members in every phase: those of the
    layout if it is fixed (`step.fixed_buckets`), else neighbours in the order of their first gather.

    Needs: InsertAllGathers. Numerics: unchanged, bit for bit.
    Source: DeepSpeed PR 1453 (coalesced all-gathers); deviation: a bucket is laid out once, so nothing is interleaved.
    """

    bucket_bytes: int = 16 * MIB
    """Upper bound on the parameter bytes of one bucket; a larger parameter is a bucket of its own."""
    head_bytes: int | None = None
    """Upper bound on the first bucket; each later bucket may be twice as large, up to `bucket_bytes`. No compute hides
    the gather of the first bucket at the begin of forward, nor its reduction at the end of backward."""

    def __post_init__(self) -> None:
        if self.bucket_bytes <= 0:
            raise ValueError(f"bucket_bytes is {self.bucket_bytes}; it must be at least 1")
        if self.head_bytes is not None and self.head_bytes <= 0:
            raise ValueError(f"head_bytes is {self.head_bytes}; it must be at least 1, or None")

    def __call__(self, step: StepGraph, /) -> None:
        starts = step.all_gathers()
        if any(wire_format(start) for start in starts):
            raise PassOrderError("an all_gather has a wire format already; run NarrowAllGathers after this pass")
        if any(is_inside(start) for start in starts):
            raise PassOrderError("an all_gather stays inside its node already; run LocalizeAllGathers after this pass")
        if step.nodes(Role.RELEASE):
            raise PassOrderError("a bucket is released already; run ReleaseParams after this pass")
        buckets = step.fixed_buckets
        if buckets is None:
            params = [step.params[fqn] for fqn in dict.fromkeys(fqn for start in starts for fqn in members(start))]
            shard_ranks = step.sharding.shard_ranks
            groups = group_into_buckets(params, shard_ranks, self.bucket_bytes, head_bytes=self.head_bytes)
            buckets = tuple(group.fqns for group in groups)
        bucket_of = {fqn: bucket for bucket in buckets for fqn in bucket}
        for _, nodes in step.phases():
            by_bucket: dict[tuple[str, ...], list[fx.Node]] = {}
            for start in nodes:
                if start.target is ops.all_gather:
                    by_bucket.setdefault(bucket_of[members(start)[0]], []).append(start)
            for bucket, parts in by_bucket.items():
                if members(parts[0]) != bucket:
                    self._merge(step, bucket, parts)

    def _merge(self, step: StepGraph, bucket: tuple[str, ...], parts: list[fx.Node]) -> None:
        """Replace the gathers of some members by one gather of the whole bucket at the place of the first."""
        params, index = step.param_nodes(), {fqn: at for at, fqn in enumerate(bucket)}
        with step.graph.inserting_before(parts[0]):
            start = step.graph.call_function(ops.all_gather, tuple(params[fqn] for fqn in bucket))
            wait = step.graph.call_function(ops.wait, (start,))
            last = wait
        for part in parts:
            for fqn, old in gathered_params(wait_of(part)).items():
                with step.graph.inserting_after(last):
                    last = step.graph.call_function(operator.getitem, (wait, index[fqn]))
                old.replace_all_uses_with(new_value(last, old.meta["val"]))
                step.graph.erase_node(old)
            step.graph.erase_node(wait_of(part))
            step.graph.erase_node(part)
