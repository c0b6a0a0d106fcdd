"""The process groups of a rank: one, or the two of a mesh of nodes."""

from dataclasses import dataclass
from typing import TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fxzero.errors import InputMismatchError
from fxzero.graph.sharding import Placement


@dataclass(frozen=True)
class Hierarchy:
    """The two process groups of a rank in a mesh, and all ranks of it."""

    inside: dist.ProcessGroup
    """The ranks of this node; the rank in it is that of the shard, or of the slice that nodes cut into shards."""
    across: dist.ProcessGroup
    """The ranks of the same rank inside, one of each node, two at least; the rank in it is the number of the node."""
    ranks: tuple[int, ...]
    """The global ranks of all nodes, node by node."""
    shards_across: bool = False
    """Nodes share the shards; else each holds all of them."""

    def __str__(self) -> str:
        return f"{self.across.size()} nodes of {self.inside.size()}" + ", sharded across" * self.shards_across


Group: TypeAlias = dist.ProcessGroup | Hierarchy


def group_of_mesh(mesh: DeviceMesh, across: Placement = "replicate") -> Group:
    """The group of a 1-D mesh, the groups of a 2-D mesh of (across, inside); a mesh of one node is that node's group.

    Nodes of one rank that share shards have nothing inside: they are one group, that of the column.

    Raises:
        ValueError: the mesh has another number of dimensions.
        InputMismatchError: this rank is not in it.
    """
    if mesh.ndim not in (1, 2):
        raise ValueError(
            f"mesh has {mesh.ndim} dimensions; it must have one, of the ranks to shard over, or two: (across, inside). "
            'Of a larger mesh pass a part: mesh["replicate", "shard"].'
        )
    if mesh.get_coordinate() is None:
        raise InputMismatchError("This rank is no member of the mesh. Compile on its members only.")
    if mesh.ndim == 1 or mesh.size(0) == 1:
        return mesh.get_group(mesh.ndim - 1)
    shards_across = across == "shard"
    if shards_across and mesh.size(1) == 1:
        return mesh.get_group(0)
    return Hierarchy(mesh.get_group(1), mesh.get_group(0), tuple(mesh.mesh.flatten().tolist()), shards_across)


def resolve_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The given group, else the default one; None if torch.distributed is not in use."""
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group
