"""Ranks that are not there: their numbers can be asked for, nothing can be bound or moved."""

from __future__ import annotations

from typing import Literal, NoReturn

from torch import Tensor

from fxzero.comm.backend import Backend
from fxzero.comm.base import Bound, Comm
from fxzero.errors import PlanError
from fxzero.graph.layout import Payload
from fxzero.graph.sharding import Sharding


class PlanningComm(Comm):
    """A rank of a job that is not there: its numbers can be asked for, nothing can be bound or moved."""

    def __init__(self, rank: int, sharding: Sharding, backend: Backend) -> None:
        super().__init__(rank, sharding)
        self.backend = backend

    def bind_gather(self, payload: Payload, shard: Tensor, full: Tensor) -> Bound:
        self._refuse()

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
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
            f"This is rank {self.rank} of {self.shard_ranks} of a process group that is not there. "
            "Such a plan can be shown, not run; to run it, start that many ranks with torchrun."
        )
