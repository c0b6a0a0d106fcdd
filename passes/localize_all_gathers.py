"""Gather a bucket inside the node if an earlier gather brought it there from other nodes."""

from dataclasses import dataclass

from fxzero.graph.nodes import members, set_inside
from fxzero.graph.step import StepGraph


@dataclass(frozen=True)
class LocalizeAllGathers:
    """Let all gathers of a bucket but the first of a step read secondary shards, so that they do not cross nodes.

    Before:  all_gather w across | ... | end_forward | all_gather w across | ...
    After:   all_gather w across | ... | end_forward | all_gather w | ...

    The first gather leaves a secondary shard in each rank: the slice of the bucket that the rank sends inside its node,
    as large as if each node held all shards. If nodes share no shards, the pass changes nothing.

    Needs: BucketAllGathers (or InsertAllGathers alone). Numerics: unchanged, bit for bit.
    Source: ZeRO++ (arXiv:2306.10209), hpZ; deviation: only buckets that are gathered again have secondary shards.
    """

    def __call__(self, step: StepGraph, /) -> None:
        starts = step.all_gathers()
        seen: set[tuple[str, ...]] = set()
        for start in starts if step.sharding.shards_across else []:
            if members(start) in seen:
                set_inside(start)
            seen.add(members(start))
