"""The compiler passes, and the one ordered list of them: this list is the registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from fxzero.graph.recipe import Recipe
from fxzero.graph.step import Pass
from fxzero.passes.bucket_all_gathers import BucketAllGathers
from fxzero.passes.bucket_reduce_scatters import BucketReduceScatters
from fxzero.passes.chunk_loss import ChunkLoss
from fxzero.passes.complete_collectives import CompleteCollectives
from fxzero.passes.fuse_compute import FuseCompute
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


def inserting_passes(recipe: Recipe) -> tuple[Pass, ...]:
    """The first of the default passes: those that write one collective for each parameter and use."""
    recompute = RecomputeActivations(recipe.recompute, recipe.recompute_level)
    fuses = FuseCompute(repeats_costly=recipe.recompute != "none", exact=recipe.compute == "exact")
    fuse = () if recipe.compute == "eager" else (fuses,)
    chunk = (ChunkLoss(recipe.loss_chunks),) if recipe.loss_chunks > 1 else ()
    inserting = (*chunk, RematerializeViews(), recompute, *fuse, InsertAllGathers(), InsertReduceScatters())
    return (*inserting, CompleteCollectives(recipe.needs)) if recipe.needs else inserting


class DefaultPasses(tuple[Pass, ...]):
    """The passes that a recipe stands for, as an ordinary tuple that knows its recipe."""

    recipe: Recipe

    def __new__(cls, recipe: Recipe, passes: Iterable[Pass]) -> DefaultPasses:
        made = super().__new__(cls, passes)
        made.recipe = recipe
        return made

    def __getitem__(self, index: Any) -> Any:
        """As of any tuple: a slice that leaves nothing out is the tuple itself."""
        part = super().__getitem__(index)
        return self if isinstance(index, slice) and part == tuple(self) else part

    def __getnewargs__(self) -> tuple[Recipe, tuple[Pass, ...]]:
        return self.recipe, tuple(self)


def default_passes(recipe: Recipe | None = None, /, **changes: Any) -> DefaultPasses:
    """The passes that a recipe stands for, in order; the only place that makes passes of one.

    All keep numerics bit for bit, but for those of `compute`, `loss_chunks`, `gather_dtype` and `reduce_dtype`.

    Args:
        recipe: default: `Recipe()`.
        changes: fields of the recipe that have another value, as of `dataclasses.replace`.
    """
    recipe = dataclasses.replace(recipe or Recipe(), **changes)
    has_overlap = "overlap" not in recipe.without
    has_prefetch = has_overlap and "prefetch" not in recipe.without
    prefetch_bytes, reduce_bytes = (0, 0) if recipe.is_tight else (recipe.prefetch_bytes, recipe.reduce_bytes)
    passes = (
        *inserting_passes(recipe),
        BucketAllGathers(recipe.bucket_bytes, recipe.head_bytes),
        BucketReduceScatters(),
        KeepGathered(recipe.max_kept_bytes, recipe.kept, recipe.resident),
        *([PrefetchAllGathers(prefetch_bytes)] if has_prefetch else []),
        GathersFirst(recipe.later),
        *([SinkWaits(reduce_bytes)] if has_overlap else []),
        ReleaseParams(),
        WriteGradsInPlace(),
        LocalizeAllGathers(),
        *([] if recipe.gather_dtype is None else [NarrowAllGathers(recipe.gather_dtype)]),
        *([] if recipe.reduce_dtype is None else [NarrowReduceScatters(recipe.reduce_dtype)]),
    )
    return DefaultPasses(recipe, passes)


__all__ = [
    "BucketAllGathers",
    "BucketReduceScatters",
    "ChunkLoss",
    "CompleteCollectives",
    "DefaultPasses",
    "FuseCompute",
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
    "inserting_passes",
]
