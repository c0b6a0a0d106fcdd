"""Bytes that a rank sends, and receives, in a collective: inside its node, and to other nodes."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from fxzero.graph.layout import Bucket
from fxzero.graph.nodes import is_gather, is_inside
from fxzero.graph.stages import sent_across_numel, stage_inside
from fxzero.graph.step import StepGraph


class Sent(NamedTuple):
    """Bytes of one collective, of one direction; without nodes, all are inside."""

    inside: int
    across: int = 0

    @property
    def total(self) -> int:
        return self.inside + self.across

    def plus(self, other: Sent) -> Sent:
        """Bytes of both."""
        return Sent(self.inside + other.inside, self.across + other.across)


NOTHING = Sent(0)


def sent_in(step: StepGraph, start: fx.Node) -> Sent:
    """What a rank sends in a collective of a step."""
    return sent_of(step, step.wire_bucket_of(start), is_gather=is_gather(start), stays_inside=is_inside(start))


def sent_of(step: StepGraph, travels: Bucket, *, is_gather: bool, stays_inside: bool = False) -> Sent:
    """What a rank sends when a bucket is gathered, or reduced.

    Args:
        travels: the bucket in the type that travels.
        stays_inside: it is gathered from secondary shards.
    """
    if step.shards_across:
        inside = stage_inside(travels, step.num_nodes)
        across = 0 if stays_inside else (step.num_nodes - 1) * travels.shard_nbytes
        return Sent(inside.shard_nbytes * (inside.world_size - 1), across)
    inside = travels.shard_nbytes * (travels.world_size - 1)
    if is_gather:
        return Sent(inside)
    return Sent(inside, sent_across_numel(travels.shard_numel, step.num_nodes) * travels.dtype.itemsize)
