"""How the ranks of a job share a model: a placement for each axis of their mesh.

strategy                              across       inside    a gather
one group (ZeRO stage 3)              size 1       shard     reaches all ranks
nodes that are replicas (HSDP, MiCS)  replicate    shard     stays inside the node; gradients are averaged across
nodes that share shards (hpZ)         shard        shard     crosses nodes once in a step, then reads secondary shards

          inside ->
across    0 1 2 3      node 0     a row is a node
   |      4 5 6 7      node 1     a column has one rank of each node
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Placement: TypeAlias = Literal["replicate", "shard"]
"""Relation of the ranks along an axis: they hold replicas, or shards of one model state."""


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh of ranks."""

    size: int
    placement: Placement = "shard"


@dataclass(frozen=True)
class Sharding:
    """The placement of parameters, gradients and optimizer state on a mesh of nodes. Default: one rank."""

    inside: Axis = Axis(1)
    """Axis of the ranks inside a node."""
    across: Axis = Axis(1, "replicate")
    """Axis of the nodes."""

    @classmethod
    def over(cls, world_size: int, num_nodes: int = 1, across: Placement = "replicate") -> Sharding:
        """The sharding of ranks that are spread evenly over nodes.

        Nodes of one rank each that share shards are one group.

        Raises:
            ValueError: `num_nodes` does not divide `world_size`, or `across` is not a Placement.
        """
        check_placement(across)
        if num_nodes < 1 or world_size % num_nodes:
            raise ValueError(f"num_nodes is {num_nodes}; it must divide the world_size of {world_size}")
        if num_nodes == 1 or (across == "shard" and num_nodes == world_size):
            return cls(Axis(world_size))
        return cls(Axis(world_size // num_nodes), Axis(num_nodes, across))

    @property
    def num_nodes(self) -> int:
        return self.across.size

    @property
    def node_ranks(self) -> int:
        """Number of ranks in a node; of all ranks if there is one node."""
        return self.inside.size

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return self.inside.size * self.across.size

    @property
    def shard_ranks(self) -> int:
        """Number of ranks that share a bucket, each with another shard."""
        return self.world_size if self.shards_across else self.inside.size

    @property
    def shards_across(self) -> bool:
        """True if nodes share the shards, so that a gather crosses nodes."""
        return self.across.placement == "shard" and self.across.size > 1

    @property
    def is_alone(self) -> bool:
        """True if there is one rank."""
        return self.world_size == 1


def check_placement(across: str) -> None:
    """Raise ValueError if `across` is not a Placement; the message lists the placements."""
    if across not in get_args(Placement):
        raise ValueError(f"across is {across!r}; it must be one of {', '.join(map(repr, get_args(Placement)))}")
