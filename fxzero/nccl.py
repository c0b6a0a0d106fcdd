"""Collectives on NCCL: one call each, straight between the persistent buffers.

Whatever stream is current at a start is what the collective's inputs are ready on; whatever stream is current at a wait
waits for exactly that collective. `streams.py` decides which streams those are.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fxzero import compat
from fxzero.comm import Bound, GroupComm
from fxzero.layout import Bucket


class NcclComm(GroupComm):
    """CUDA tensors over NCCL, two ranks or more. The order of sums is NCCL's."""

    def reduce_scratch_numel(self, bucket: Bucket, *, accumulate: bool = True) -> int:
        return accumulate * bucket.shard_numel

    def bind_gather(self, bucket: Bucket, shard: Tensor, full: Tensor) -> Bound:
        all_gather, lost, what = compat.all_gather_base(self.group), self.lost, self.what("all-gather", bucket)
        work: dist.Work | None = None

        def start() -> None:
            nonlocal work
            try:
                work = all_gather(full, shard)
            except RuntimeError as error:
                raise lost(what, error) from error

        def wait() -> None:
            nonlocal work
            assert work is not None, "wait without start"
            try:
                work.wait()
            except RuntimeError as error:
                raise lost(what, error) from error
            work = None

        return Bound(start, wait)

    def bind_reduce(
        self, bucket: Bucket, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        reduce_scatter, lost = compat.reduce_scatter_base(self.group), self.lost
        what = self.what("reduce-scatter", bucket)
        if accumulate and (scratch is None or scratch.numel() < bucket.shard_numel):
            raise ValueError(f"scratch must have at least {bucket.shard_numel} elements to reduce {bucket.fqns[0]}")
        average = scratch[: bucket.shard_numel] if accumulate and scratch is not None else shard
        options = dist.ReduceScatterOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG)
        work: dist.Work | None = None

        def start() -> None:
            nonlocal work
            try:
                work = reduce_scatter(average, full, options)
            except RuntimeError as error:
                raise lost(what, error) from error

        def wait() -> None:
            nonlocal work
            assert work is not None, "wait without start"
            try:
                work.wait()
            except RuntimeError as error:
                raise lost(what, error) from error
            work = None
            if accumulate:
                shard.add_(average)

        return Bound(start, wait)
