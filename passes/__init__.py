"""The compiler passes, and the one ordered list of them: this list is the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch

from fxzero.graph.step import StepGraph
from fxzero.passes.bucket_all_gathers import BucketAllGathers
from fxzero.passes.bucket_reduce_scatters import BucketReduceScatters
from fxzero.passes.gathers_first import GathersFirst
from fxzero.passes.insert_all_gathers import InsertAllGathers
from fxzero.passes.insert_reduce_scatters import InsertReduceScatters
from fxzero.passes.keep_gathered import KeepGathered
from fxzero.passes.localize_all_gathers import LocalizeAllGathers
from fxzero.passes.narrow_all_gathers import NarrowAllGathers
from fxzero.passes.narrow_reduce_scatters import NarrowReduceScatters
from fxzero.passes.prefetch_all_gathers import PrefetchAllGathers
from fxzero.passes.recompute_activations import RecomputeActivations
from fxzero.passes.release_params import ReleaseParams
from fxzero.passes.rematerialize_views import RematerializeViews
from fxzero.passes.sink_waits import SinkWaits
from fxzero.passes.write_grads_in_place import WriteGradsInPlace

Pass: TypeAlias = Callable[[StepGraph], None]
"""Edits a graph in place. One that changes numbers has a property `tolerance`: by how much outputs and gradients may
change, relative to the largest magnitude among them."""


def default_passes(
    *,
    bucket_bytes: int = BucketAllGathers.bucket_bytes,
    max_kept_bytes: int | None = 0,
    prefetch_bytes: int = PrefetchAllGathers.max_inflight_bytes,
    recompute: Literal["none", "full"] | int = "none",
    reduce_bytes: int = SinkWaits.max_inflight_bytes,
    gather_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> tuple[Pass, ...]:
    """The passes of a plan, in order; all keep numerics bit for bit but for those that the last two arguments add.

    Args:
        bucket_bytes: upper bound on the parameter bytes of one bucket.
        max_kept_bytes: upper bound on gathered bytes kept from forward to backward; 0 gathers all again (ZeRO stage 3),
            None keeps all (the residency of stage 2).
        prefetch_bytes: upper bound on gathered bytes in flight.
        recompute: "none", "full" (whole repeated blocks), or an upper bound on the bytes saved for backward.
        reduce_bytes: upper bound on gradient-bucket bytes in flight.
        gather_dtype: in which parameters travel: torch.bfloat16, or torch.int8 with a scale for each block.
        reduce_dtype: in which gradients travel: torch.bfloat16.
    """
    narrow: list[Pass] = [] if gather_dtype is None else [NarrowAllGathers(gather_dtype)]
    narrow += [] if reduce_dtype is None else [NarrowReduceScatters(reduce_dtype)]
    return (
        RematerializeViews(),
        RecomputeActivations(recompute),
        InsertAllGathers(),
        InsertReduceScatters(),
        BucketAllGathers(bucket_bytes),
        BucketReduceScatters(),
        KeepGathered(max_kept_bytes),
        PrefetchAllGathers(prefetch_bytes),
        GathersFirst(),
        SinkWaits(reduce_bytes),
        ReleaseParams(),
        WriteGradsInPlace(),
        LocalizeAllGathers(),
        *narrow,
    )


__all__ = [
    "BucketAllGathers",
    "BucketReduceScatters",
    "GathersFirst",
    "InsertAllGathers",
    "InsertReduceScatters",
    "KeepGathered",
    "LocalizeAllGathers",
    "NarrowAllGathers",
    "NarrowReduceScatters",
    "Pass",
    "PrefetchAllGathers",
    "RecomputeActivations",
    "ReleaseParams",
    "RematerializeViews",
    "SinkWaits",
    "WriteGradsInPlace",
    "default_passes",
]
