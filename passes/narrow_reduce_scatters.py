"""Reduce gradients in a narrower dtype than their own."""

from dataclasses import dataclass

import torch

from fxzero.graph.nodes import set_wire_format
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import WireFormat, check_reduce_dtype, narrowed


@dataclass(frozen=True)
class NarrowReduceScatters:
    """Let each reduce-scatter travel as bfloat16.

    Before:  write_grad dw | reduce_scatter dw 16 KiB | wait dw
    After:   write_grad dw | reduce_scatter dw 8 KiB as bfloat16 | wait dw

    Each rank's gradient is rounded once, before it is sent. On gloo, ranks are summed and divided in the gradient's own
    dtype, in rank order; NCCL sums over ranks in bfloat16. Sums over micro-batches keep the gradient's dtype. A bucket
    that the format makes no smaller stays as it is, and so does every bucket of one rank alone.

    Needs: BucketReduceScatters (or InsertReduceScatters alone). Numerics: changed, see above.
    Source: FSDP2's MixedPrecisionPolicy(reduce_dtype=...); deviation: on gloo, sums keep the gradient's dtype.
    """

    dtype: torch.dtype = torch.bfloat16
    """torch.bfloat16."""

    def __post_init__(self) -> None:
        check_reduce_dtype(self.dtype)

    @property
    def format(self) -> WireFormat:
        """The wire format of buckets that it makes smaller."""
        return WireFormat(self.dtype)

    @property
    def tolerance(self) -> float:
        """The largest change of gradients, relative to the largest of them, that FXZERO_CHECK=1 allows.

        It is the effect of rounding one element to bfloat16.
        """
        return 2**-8

    def __call__(self, step: StepGraph, /) -> None:
        starts = step.reduce_scatters()
        for start in starts if step.sharding.shard_ranks > 1 else []:
            payload = step.payload_of(start)
            if narrowed(payload, self.format) is not payload:
                set_wire_format(start, self.format)
