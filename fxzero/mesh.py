"""The ranks of a 2-D mesh: nodes of ranks that shard among each other, each node a replica of the others.

          inside ->
across    0 1 2 3      node 0      a row shards: all its gathers stay inside
   |      4 5 6 7      node 1      a column has the same shard, of which it averages the gradient
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fxzero.errors import InputMismatchError


@dataclass(frozen=True)
class Hierarchy:
    """The two process groups of a rank in a mesh, and all ranks of it."""

    inside: dist.ProcessGroup
    """The ranks of this node; the rank in it is that of the shard."""
    across: dist.ProcessGroup
    """The ranks with the same shard, one of each node, two at least; the rank in it is the number of the node."""
    ranks: tuple[int, ...]
    """The global ranks of all nodes, node by node."""

    def __str__(self) -> str:
        return f"{self.across.size()} nodes of {self.inside.size()}"


Group: TypeAlias = dist.ProcessGroup | Hierarchy


def group_of_mesh(mesh: DeviceMesh) -> Group:
    """The group of a 1-D mesh, the groups of a 2-D mesh of (across, inside); a mesh of one node is that node's group.

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
    return Hierarchy(mesh.get_group(1), mesh.get_group(0), tuple(mesh.mesh.flatten().tolist()))


def sent_across_numel(shard_numel: int, num_nodes: int) -> int:
    """Elements that a rank sends to other nodes to reduce its shard [shard_numel] over all of them.

    Two nodes exchange the shard. Of more, each reduces a part of it, and then all gather the parts: 2 (N - 1) / N of
    it, where exchanging whole shards would send it N - 1 times. A rank with a smaller part than others sends less.
    """
    if num_nodes < 3:
        return (num_nodes - 1) * shard_numel
    part = -(-shard_numel // num_nodes)
    return shard_numel - part + (num_nodes - 1) * part
