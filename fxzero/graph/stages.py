"""The two stages of a collective over nodes that share shards: inside each node, and across nodes.

          inside ->
across    0 1 2 3      node 0     a row exchanges the slices of its node
   |      4 5 6 7      node 1     a column has neighbouring shards, which make the slice that its row exchanges

Shards are numbered column by column, rank r of node n has that of r * num_nodes + n:

bucket    [ 0 1 | 2 3 | 4 5 | 6 7 ]       the shards of four ranks in two nodes
inside    [  0  |  1  |  2  |  3  ]       the slices that a rank of each node receives from the others of its node
"""

from __future__ import annotations

from dataclasses import replace

from fxzero.graph.layout import Payload


def stage_inside(payload: Payload, num_nodes: int) -> Payload:
    """A whole payload, cut into the slices of the ranks of one node, each of `num_nodes` neighbouring shards."""
    num_slices = payload.num_slices // num_nodes
    return replace(payload, num_slices=num_slices, slice_numel=num_nodes * payload.slice_numel)


def stage_across(payload: Payload, num_nodes: int) -> Payload:
    """One such slice, cut into the shards of the nodes."""
    return replace(payload, num_slices=num_nodes)


def sent_across_numel(shard_numel: int, num_nodes: int) -> int:
    """Elements that a rank sends to other nodes to reduce its shard [shard_numel] over all of them, as replicas do.

    Two nodes exchange the shard. Of more, each reduces a part of it, and then all gather the parts: 2 (N - 1) / N of
    it, where exchanging whole shards would send it N - 1 times. A rank with a smaller part than others sends less.
    """
    if num_nodes < 3:
        return (num_nodes - 1) * shard_numel
    part = -(-shard_numel // num_nodes)
    return shard_numel - part + (num_nodes - 1) * part
