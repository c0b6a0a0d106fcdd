"""Gather parameters in a narrower type than they have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role, set_wire_format
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import BLOCK_NUMEL, WireFormat, check_gather_dtype, narrowed


@dataclass(frozen=True)
class NarrowAllGathers:
    """Let each gather move bfloat16, or int8 with a scale for each block of a shard, and bring it back at its wait.

    Before:  all_gather w 16 KiB | wait w
    After:   all_gather w 8 KiB as bfloat16 | wait w

    Shards and compute keep their types: only what is on the wire changes. The rank's own slice is rounded like those of
    others. Left alone are buckets that would get no fewer bytes, so those of a bfloat16 model by bfloat16, and a rank
    that is alone, whose parameters then are not rounded. In an interleaved layout gathers cannot be quantised.

    Needs: BucketAllGathers (or InsertAllGathers alone). Numerics: changed. The step computes with parameters rounded to
    bfloat16, or with int8 to a multiple of the scale of their block, by at most half of it; it updates the exact ones.
    Source: ZeRO++ (arXiv:2306.10209), qwZ; deviation: see `fxzero/narrow.py`.
    """

    dtype: torch.dtype = torch.bfloat16
    """torch.bfloat16 or torch.int8."""
    block_numel: int = BLOCK_NUMEL
    """Elements that share a scale, of int8."""

    def __post_init__(self) -> None:
        check_gather_dtype(self.dtype)
        if self.block_numel < 1:
            raise ValueError(f"block_numel is {self.block_numel}; it must be at least 1")

    @property
    def format(self) -> WireFormat:
        """What buckets travel in, where that is narrower."""
        return WireFormat(self.dtype, self.block_numel if self.dtype is torch.int8 else None)

    @property
    def tolerance(self) -> float:
        """By how much outputs and gradients may change, relative to the largest of them: what FXZERO_CHECK=1 allows.

        How far rounding spreads depends on the model. These are about 2.5 times the most that was seen on toy models.
        """
        return 1 / 16 if self.dtype is torch.bfloat16 else 1 / 4

    def __call__(self, step: StepGraph, /) -> None:
        starts = step.nodes(Role.ALL_GATHER)
        if not starts and any(param.users for param in step.param_nodes().values()):
            raise PassOrderError("no all_gather in the graph; run InsertAllGathers first")
        for start in starts if step.sharding.shard_ranks > 1 else []:
            payload = step.payload_of(start)
            if narrowed(payload, self.format) is not payload:
                set_wire_format(start, self.format)
