"""Ranks that are not there: their numbers can be asked for, nothing can be bound or moved."""

from typing import Any, NoReturn

from fxzero.comm.backend import Backend
from fxzero.comm.base import Comm
from fxzero.errors import PlanError
from fxzero.graph.sharding import Sharding


class PlanningComm(Comm):
    """A rank of a job that is not there: every collective raises a PlanError."""

    def __init__(self, rank: int, sharding: Sharding, backend: Backend) -> None:
        super().__init__(rank, sharding)
        self.backend = backend

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PlanError(
            f"This is rank {self.rank} of {self.shard_ranks} of a process group that is not there. "
            "Such a plan can be shown, not run; to run it, start that many ranks with torchrun."
        )

    bind_gather = bind_reduce = all_reduce = _refuse
    scatter_from_rank0 = broadcast_from_rank0 = gather_to_all = gather_to_rank0 = all_to_all = _refuse
