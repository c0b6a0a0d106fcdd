"""The copies of the interleaved layout, between a bucket and what travels: one strided copy per parameter.

    staging:  [ w1/0 b1/0 | w1/1 b1/1 | w1/2 b1/2 ]     rank-major: the shards of all ranks, one after another
    bucket:   [ w1/0 w1/1 w1/2 | b1/0 b1/1 b1/2   ]     whole parameters

A gather receives into its staging buffer and copies out at its wait; a reduce-scatter is started after its gradients
were copied in. Source: DeepSpeed PR 1453 (coalesced collectives of partitioned parameters); deviation: both buffers
have planned, persistent places, where the original allocates and concatenates.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fxzero import torch_internals
from fxzero.graph.layout import Bucket, InterleavedBucket
from fxzero.runtime.shards import unflatten


def copy_out(bucket: InterleavedBucket, staging: torch.Tensor, full: torch.Tensor) -> Callable[[], object]:
    """What brings gathered parameters from a staging buffer to their bucket; both are `[bucket.numel]`."""
    return partial(torch_internals.copy_all, _in_bucket(bucket, full), _in_staging(bucket, staging))


def copy_in(bucket: InterleavedBucket, full: torch.Tensor, staging: torch.Tensor) -> Callable[[], object]:
    """What brings gradients from their bucket to a staging buffer.

    In the bucket, the elements that belong to no parameter must be zero: they are copied too.
    """
    return partial(torch_internals.copy_all, _in_staging(bucket, staging), _in_bucket(bucket, full))


def gathered_members(bucket: Bucket, received: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a bucket at their full shapes, from the shards of all ranks in rank order, `[bucket.numel]`.

    Views of `received`; in an interleaved layout copies, of which one at a time is made.
    """
    if not isinstance(bucket, InterleavedBucket):
        yield from unflatten(bucket, received).items()
        return
    for param, parts in zip(bucket.params, _in_staging(bucket, received), strict=True):
        yield param.fqn, parts.reshape(-1)[: param.numel].view(param.shape)


def _in_bucket(bucket: InterleavedBucket, full: torch.Tensor) -> list[torch.Tensor]:
    """The parts of each parameter where it lies in the bucket: `[shard_ranks, part_numel]`, contiguous."""
    sizes = [(bucket.offsets[param.fqn], bucket.part_numel(param)) for param in bucket.params]
    return [full[begin:][: bucket.shard_ranks * numel].view(bucket.shard_ranks, numel) for begin, numel in sizes]


def _in_staging(bucket: InterleavedBucket, staging: torch.Tensor) -> list[torch.Tensor]:
    """The parts of each parameter in the shards of all ranks: `[shard_ranks, part_numel]`, rows a shard apart."""
    shards = staging.view(bucket.shard_ranks, bucket.shard_numel)
    sizes = [(bucket.part_offsets[param.fqn], bucket.part_numel(param)) for param in bucket.params]
    return [shards[:, begin : begin + numel] for begin, numel in sizes]
