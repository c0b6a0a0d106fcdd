"""The two stages of a collective over nodes that share shards: inside each node, and across nodes.

          inside ->
across    0 1 2 3      node 0     the ranks of a row exchange slices
   |      4 5 6 7      node 1     the ranks of a column hold neighbouring shards, which make up one slice

Shards are numbered column by column: rank r of node n holds shard r * num_nodes + n.

bucket    [ 0 1 | 2 3 | 4 5 | 6 7 ]       the shards of four ranks in each of two nodes
inside    [  0  |  1  |  2  |  3  ]       the slices that the ranks of one node exchange
"""

from dataclasses import replace

from fxzero.graph.layout import Payload


def stage_inside(payload: Payload, num_nodes: int) -> Payload:
    """The payload of the stage inside nodes: one slice for each rank of a node, of `num_nodes` neighbouring shards."""
    num_slices = payload.num_slices // num_nodes
    return replace(payload, num_slices=num_slices, slice_numel=num_nodes * payload.slice_numel)


def stage_across(payload: Payload, num_nodes: int) -> Payload:
    """The payload of the stage across nodes: the `num_nodes` shards of one slice."""
    return replace(payload, num_slices=num_nodes)


def sent_across_numel(shard_numel: int, num_nodes: int) -> int:
    """Elements that a rank sends to other nodes to reduce its shard [shard_numel] over nodes that are replicas.

    Two nodes exchange the shard. More nodes reduce a part of the shard each, and then gather the parts. So a rank sends
    2 (N - 1) / N of the shard, where an exchange of whole shards would send it N - 1 times.
    """
    if num_nodes < 3:
        return (num_nodes - 1) * shard_numel
    part = -(-shard_numel // num_nodes)
    return shard_numel - part + (num_nodes - 1) * part
