"""Bytes that a rank sends, and receives, in a collective: inside its node, and to other nodes."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from fxzero.graph.layout import Payload
from fxzero.graph.nodes import is_gather, is_inside
from fxzero.graph.sharding import Sharding
from fxzero.graph.stages import sent_across_numel, stage_inside
from fxzero.graph.step import StepGraph


class Sent(NamedTuple):
    """Bytes that a rank sends in a collective. With one node, all are inside."""

    inside: int
    across: int = 0

    @property
    def total(self) -> int:
        return self.inside + self.across

    def plus(self, other: Sent) -> Sent:
        """The sum with another collective's bytes."""
        return Sent(self.inside + other.inside, self.across + other.across)


NOTHING = Sent(0)


def sent_in(step: StepGraph, start: fx.Node) -> Sent:
    """The bytes that a rank sends in a collective of a step."""
    return sent_of(step.sharding, step.travels(start), is_gather=is_gather(start), stays_inside=is_inside(start))


def sent_of(sharding: Sharding, travels: Payload, *, is_gather: bool, stays_inside: bool = False) -> Sent:
    """The bytes that a rank sends to gather or reduce a bucket.

    Args:
        travels: the payload in its wire format.
        stays_inside: True for a gather of secondary shards.
    """
    num_nodes = sharding.num_nodes
    if sharding.shards_across:
        inside = stage_inside(travels, num_nodes)
        across = 0 if stays_inside else (num_nodes - 1) * travels.slice_nbytes
        return Sent(inside.slice_nbytes * (inside.num_slices - 1), across)
    inside_bytes = travels.slice_nbytes * (travels.num_slices - 1)
    if is_gather:
        return Sent(inside_bytes)
    return Sent(inside_bytes, sent_across_numel(travels.slice_numel, num_nodes) * travels.dtype.itemsize)
