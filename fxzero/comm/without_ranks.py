"""Ranks that are not there: their numbers can be asked for, nothing can be bound or moved."""

from __future__ import annotations

from typing import Literal, NoReturn

import torch
from torch import Tensor

from fxzero.comm.base import Bound, Comm
from fxzero.comm.nodes_share import gloo_scratch_numel, nccl_scratch_numel
from fxzero.errors import PlanError
from fxzero.graph.layout import Bucket


class PlanningComm(Comm):
    """A rank of a cluster that is not there: its numbers can be asked for, nothing can be bound or moved.

    Args:
        rank, world_size: inside a node.
        device: whose numbers: "cpu" stands for gloo, "cuda" for NCCL.
    """

    def __init__(self, rank: int, world_size: int, device: str | torch.device = "cpu", *, num_nodes: int = 1) -> None:
        super().__init__(rank, world_size)
        self.num_nodes = num_nodes
        self.device = torch.device(device)

    @property
    def sums_locally(self) -> bool:
        return self.num_nodes == 1 and self.device.type == "cpu"

    def reduce_scratch_numel(self, bucket: Bucket, *, accumulate: bool = True) -> int:
        if self.world_size == 1:
            receives = accumulate and self.device.type == "cpu" and not self.is_alone
            return bucket.shard_numel if receives else 0
        if self.device.type == "cpu":
            return (self.world_size - 2 + accumulate) * bucket.shard_numel
        return accumulate * bucket.shard_numel

    def bind_gather(self, bucket: Bucket, shard: Tensor, full: Tensor) -> Bound:
        self._refuse()

    def bind_reduce(
        self, bucket: Bucket, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        self._refuse()

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        self._refuse()

    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        self._refuse()

    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        self._refuse()

    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        self._refuse()

    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise PlanError(
            f"This is rank {self.rank} of {self.world_size} of a process group that is not there. "
            "Such a plan can be shown, not run; to run it, start that many ranks with torchrun."
        )


class ShardedPlanningComm(PlanningComm):
    """A rank of nodes that are not there and share the shards.

    Args:
        rank, world_size: of all nodes.
    """

    def __init__(self, rank: int, world_size: int, device: str | torch.device = "cpu", *, num_nodes: int) -> None:
        super().__init__(rank, world_size, device, num_nodes=num_nodes)
        self.shards_across = True

    def reduce_scratch_numel(self, bucket: Bucket, *, accumulate: bool = True) -> int:
        if self.device.type == "cpu":
            return gloo_scratch_numel(bucket, self.num_nodes)
        return nccl_scratch_numel(bucket, self.num_nodes, accumulate=accumulate)
