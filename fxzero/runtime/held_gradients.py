"""Reduce outside of a backward what backwards have held unsharded: bucket by bucket, in memory of the moment.

unsharded gradients of all micro-batches -> staging, where another dtype or order travels -> reduce-scatter -> shard

The numbers are those of a backward that reduces, behind the same micro-batches.
"""

from collections.abc import Sequence
from functools import partial

import torch

from fxzero.comm.base import Bound, Comm
from fxzero.comm.wire_copies import bind_bucket_reduce, bind_reduce_of_sums, bucket_scratch_nbytes, sums_here
from fxzero.graph.layout import Bucket, InterleavedBucket
from fxzero.graph.variant import Stash, Variant
from fxzero.graph.wire import WireFormat, narrowed, on_wire
from fxzero.runtime.gradients import Gradients
from fxzero.runtime.interleave import copy_in
from fxzero.runtime.shards import Shards


def reduce_held(
    gradients: Gradients, shards: Shards, comm: Comm, format: WireFormat | None
) -> tuple[Variant, Sequence[str]]:
    """Reduce all that is held into the shards of gradients.

    Args:
        format: the wire format of buckets that it makes smaller.

    Returns:
        What is to be published: how it was reduced, and the parameters that other ranks may have reached.
    """
    accumulate = gradients.variant(synchronize=True).accumulate
    buckets = gradients.held_buckets
    fqns = [fqn for bucket in buckets for fqn in bucket.fqns]
    if not gradients.are_held:  # all was reset here, and other ranks may not have reached what this one has
        for bucket in buckets:
            gradients.clear_unsharded(bucket)
    for bucket in buckets:
        for fqn in bucket.fqns:
            gradients.view(fqn)
        is_narrower = comm.shard_ranks > 1 and narrowed(bucket.gradients, format) is not bucket.gradients
        bound = _bind(gradients, shards, comm, bucket, format if is_narrower else None, accumulate=accumulate)
        for call in bound:
            if call is not None:
                call()
        gradients.clear_unsharded(bucket)
    return Variant(accumulate, Stash.FLUSH), () if comm.is_alone else fqns


def _bind(
    gradients: Gradients, shards: Shards, comm: Comm, bucket: Bucket, format: WireFormat | None, *, accumulate: bool
) -> Bound:
    """The reduction of the unsharded gradients of one bucket into the gradient shard."""
    unsharded, shard = gradients.unsharded_bucket(bucket), shards.grad_shard(bucket)
    room = partial(torch.empty, device=shards.device)
    if format is None and sums_here(comm, bucket):
        received = room((bucket.shard_ranks - 1) * bucket.sums.slice_nbytes, dtype=torch.uint8)
        return bind_reduce_of_sums(comm, bucket, unsharded, [received], shard, accumulate=accumulate)
    travels = on_wire(bucket.gradients, format)
    if isinstance(bucket, InterleavedBucket):
        sent = room(travels.numel, dtype=travels.dtype)
        copy_in(bucket, unsharded, sent)()
    else:
        sent = unsharded if travels.dtype is unsharded.dtype else unsharded.to(travels.dtype)
    nbytes = bucket_scratch_nbytes(comm.backend, comm.sharding, bucket, format, accumulate=accumulate)
    scratch = room(nbytes, dtype=torch.uint8) if nbytes else None
    return bind_bucket_reduce(comm, bucket, format, sent, scratch, shard, accumulate=accumulate)
