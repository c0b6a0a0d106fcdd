"""One reduce-scatter per bucket instead of one per gradient."""

from dataclasses import dataclass

from torch import fx

from fxzero.errors import PassOrderError
from fxzero.graph import ops
from fxzero.graph.nodes import Role, members, operands, wait_of, wire_format
from fxzero.graph.step import StepGraph


@dataclass(frozen=True)
class BucketReduceScatters:
    """Merge the reduce-scatters of one bucket, at the place where its last gradient is ready.

    Before:  write_grad db | reduce_scatter db | wait | write_grad dw | reduce_scatter dw | wait
    After:   write_grad db | write_grad dw | reduce_scatter (dw, db) | wait

    The buckets are those of the gathers. A member that the step does not reach gets a slot of zeros, so that the
    collective is the same in every plan.

    Needs: InsertReduceScatters, BucketAllGathers. Numerics: unchanged, bit for bit.
    Source: DeepSpeed PR 1453 (coalesced reduce-scatters); deviation: slots of one flat buffer, nothing is interleaved.
    """

    def __call__(self, step: StepGraph, /) -> None:
        starts = step.reduce_scatters()
        if any(wire_format(start) for start in starts):
            raise PassOrderError("a reduce_scatter has a wire format already; run NarrowReduceScatters after this pass")
        if any(len(members(start)) > 1 for start in starts):
            raise PassOrderError("reductions are bucketed already; run BucketReduceScatters once")
        gathered = [members(gather) for gather in step.nodes(Role.ALL_GATHER)]
        bucket_of = {fqn: bucket for bucket in gathered for fqn in bucket}
        by_bucket: dict[tuple[str, ...], list[fx.Node]] = {}
        for start in starts:
            (fqn,) = members(start)
            by_bucket.setdefault(bucket_of.get(fqn, (fqn,)), []).append(start)
        grads = dict(step.grads)
        for bucket, parts in by_bucket.items():
            wait = self._merge(step, bucket, parts)
            grads.update({fqn: wait for fqn in bucket if fqn in grads})
        step.set_output(step.model_outputs, grads, step.input_grads)
        for start in starts:
            step.graph.erase_node(wait_of(start))
            step.graph.erase_node(start)

    def _merge(self, step: StepGraph, bucket: tuple[str, ...], parts: list[fx.Node]) -> fx.Node:
        slots = {members(part)[0]: operands(part)[0] for part in parts}
        with step.graph.inserting_before(parts[-1]):
            for fqn in bucket:
                if fqn not in slots:
                    slots[fqn] = step.graph.call_function(ops.write_grad, (None, fqn))
            start = step.graph.call_function(ops.reduce_scatter, tuple(slots[fqn] for fqn in bucket))
            return step.graph.call_function(ops.wait, (start,))
