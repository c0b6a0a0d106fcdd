"""The ranks of a 2-D mesh: nodes that hold a copy of the shards each, or share one.

          inside ->
across    0 1 2 3      node 0     replicate: a row shards; a column has the same shard and averages its gradient
   |      4 5 6 7      node 1     shard: all share the shards; a column has neighbours, the slice that a row exchanges

Shards that nodes share are numbered column by column, rank r of node n has that of r * num_nodes + n:

bucket    [ 0 1 | 2 3 | 4 5 | 6 7 ]       the shards of four ranks in two nodes
inside    [  0  |  1  |  2  |  3  ]       the slices that a rank of each node receives from the others of its node
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch

from fxzero.graph.layout import Bucket

Across: TypeAlias = Literal["replicate", "shard"]
"""What nodes are to each other: replicas, or holders of parts of the same shards."""


def check_across(across: str) -> None:
    """Refuse what nodes cannot be to each other.

    Raises:
        ValueError: names what they can.
    """
    if across not in get_args(Across):
        raise ValueError(f"across is {across!r}; it must be one of {', '.join(map(repr, get_args(Across)))}")


@dataclass(frozen=True)
class StageBucket(Bucket):
    """What one stage of a collective moves of a bucket: `world_size` slices, each of some neighbouring shards of it."""

    whole: Bucket
    """As all nodes gather or reduce it."""
    num_shards: int
    """Shards of the whole in a slice."""

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @cached_property
    def shard_numel(self) -> int:
        return self.num_shards * self.whole.shard_numel


def stage_inside(bucket: Bucket, num_nodes: int) -> Bucket:
    """A whole bucket, cut into the slices of the ranks of one node."""
    return StageBucket(bucket.params, bucket.world_size // num_nodes, bucket, num_nodes)


def stage_across(bucket: Bucket, num_nodes: int) -> Bucket:
    """One such slice, cut into the shards of the nodes."""
    return StageBucket(bucket.params, num_nodes, bucket, 1)


def sent_across_numel(shard_numel: int, num_nodes: int) -> int:
    """Elements that a rank sends to other nodes to reduce its shard [shard_numel] over all of them.

    Two nodes exchange the shard. Of more, each reduces a part of it, and then all gather the parts: 2 (N - 1) / N of
    it, where exchanging whole shards would send it N - 1 times. A rank with a smaller part than others sends less.
    """
    if num_nodes < 3:
        return (num_nodes - 1) * shard_numel
    part = -(-shard_numel // num_nodes)
    return shard_numel - part + (num_nodes - 1) * part
