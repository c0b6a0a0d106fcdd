"""Gather parameters in a narrower dtype than their own."""

from dataclasses import dataclass

import torch

from fxzero.errors import WireFormatError
from fxzero.graph.nodes import members, set_wire_format
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import BLOCK_NUMEL, WireFormat, check_gather_dtype, narrowed


@dataclass(frozen=True)
class NarrowAllGathers:
    """Let each gather travel as bfloat16, or as int8 with a scale for each block of a shard; its wait converts it back.

    Before:  all_gather w 16 KiB | wait w
    After:   all_gather w 8 KiB as bfloat16 | wait w

    Shards and compute keep their dtypes. The slice of the rank itself is rounded like the slices of others. A bucket
    that the format makes no smaller stays as it is, and so does every bucket of one rank alone. In an interleaved
    layout gathers cannot be quantised. Parameters that forward writes are refused: they would be rounded ever again.

    Needs: BucketAllGathers (or InsertAllGathers alone). Numerics: changed. The step computes with parameters rounded to
    bfloat16, or to a multiple of the scale of their block; the optimizer updates the exact parameters.
    Source: ZeRO++ (arXiv:2306.10209), qwZ; deviation: see `fxzero/comm/wire_copies.py`.
    """

    dtype: torch.dtype = torch.bfloat16
    """torch.bfloat16 or torch.int8."""
    block_numel: int = BLOCK_NUMEL
    """Number of elements that share a scale in int8."""

    def __post_init__(self) -> None:
        check_gather_dtype(self.dtype)
        if self.block_numel < 1:
            raise ValueError(f"block_numel is {self.block_numel}; it must be at least 1")

    @property
    def format(self) -> WireFormat:
        """The wire format of buckets that it makes smaller."""
        return WireFormat(self.dtype, self.block_numel if self.dtype is torch.int8 else None)

    @property
    def tolerance(self) -> float:
        """The largest change of outputs and gradients, relative to the largest of them, that FXZERO_CHECK=1 allows.

        The effect of rounding depends on the model. These values are about 2.5 times the largest one of toy models.
        """
        return 1 / 16 if self.dtype is torch.bfloat16 else 1 / 4

    def __call__(self, step: StepGraph, /) -> None:
        starts = step.all_gathers()
        for start in starts if step.sharding.shard_ranks > 1 else []:
            payload = step.payload_of(start)
            if narrowed(payload, self.format) is not payload:
                if rounded := sorted({*step.written}.intersection(members(start))):
                    raise WireFormatError(
                        f"{rounded[0]} is written by forward, and would be rounded to {self.format} again in each "
                        f"step. Leave out gather_dtype, or make {rounded[0]} a buffer."
                    )
                set_wire_format(start, self.format)
