"""Reduce gradients in a narrower type than they have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role, set_wire_format
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import WireFormat, check_reduce_dtype, narrowed


@dataclass(frozen=True)
class NarrowReduceScatters:
    """Let each reduce-scatter move bfloat16.

    Before:  write_grad dw | reduce_scatter dw 16 KiB | wait dw
    After:   write_grad dw | reduce_scatter dw 8 KiB as bfloat16 | wait dw

    Each rank's gradient is rounded once, before it is sent. On gloo the sums and the division are those of the
    gradient's own type, in rank order, and so are sums over micro-batches everywhere; NCCL sums over ranks in bfloat16.
    Left alone are buckets that would get no fewer bytes, and a rank that is alone.

    Needs: BucketReduceScatters (or InsertReduceScatters alone). Numerics: changed, see above.
    Source: FSDP2's MixedPrecisionPolicy(reduce_dtype=...); deviation: on gloo, sums are not made in that type.
    """

    dtype: torch.dtype = torch.bfloat16
    """torch.bfloat16."""

    def __post_init__(self) -> None:
        check_reduce_dtype(self.dtype)

    @property
    def format(self) -> WireFormat:
        """What buckets travel in, where that is narrower."""
        return WireFormat(self.dtype)

    @property
    def tolerance(self) -> float:
        """By how much gradients may change, relative to the largest of them: what rounding an element to bfloat16 does.

        FXZERO_CHECK=1 allows this much.
        """
        return 2**-8

    def __call__(self, step: StepGraph, /) -> None:
        starts = step.nodes(Role.REDUCE_SCATTER)
        if not starts and step.has_backward and step.synchronize and step.grads:
            raise PassOrderError("no reduce_scatter in the graph; run InsertReduceScatters first")
        for start in starts if step.sharding.shard_ranks > 1 else []:
            payload = step.payload_of(start)
            if narrowed(payload, self.format) is not payload:
                set_wire_format(start, self.format)
