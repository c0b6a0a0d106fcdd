"""Gather again inside the node what was gathered across nodes before."""

from __future__ import annotations

from dataclasses import dataclass

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role, members, set_inside
from fxzero.graph.step import StepGraph


@dataclass(frozen=True)
class LocalizeAllGathers:
    """Let every gather of a bucket but the first of a step read secondary shards, so that it does not cross nodes.

    Before:  all_gather w across | ... | end_forward | all_gather w across | ...
    After:   all_gather w across | ... | end_forward | all_gather w | ...

    The first gather leaves in each rank the slice of the bucket that it sends inside its node: a secondary shard, as
    large as if the node did not share its shards. Where nodes share none, and on one group, all is as it was.

    Needs: BucketAllGathers (or InsertAllGathers alone). Numerics: unchanged, bit for bit.
    Source: ZeRO++ (arXiv:2306.10209), hpZ; deviation: only buckets that are gathered again have secondary shards.
    """

    def __call__(self, step: StepGraph, /) -> None:
        starts = step.nodes(Role.ALL_GATHER)
        if not starts and any(param.users for param in step.param_nodes().values()):
            raise PassOrderError("no all_gather in the graph; run InsertAllGathers first")
        seen: set[tuple[str, ...]] = set()
        for start in starts if step.sharding.shards_across else []:
            if members(start) in seen:
                set_inside(start)
            seen.add(members(start))
