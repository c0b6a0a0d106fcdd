"""What gloo and NCCL share: the operations of one process group outside of the step, which block."""

import contextlib
from collections.abc import Generator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fxzero import torch_internals
from fxzero.comm.base import Comm
from fxzero.comm.heartbeat import heartbeat
from fxzero.comm.phases import Stop
from fxzero.errors import CommunicationError, FxzeroError, RankMismatchError, StepLeftOutError
from fxzero.graph.layout import Payload
from fxzero.graph.sharding import Sharding

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class GroupComm(Comm):
    """What gloo and NCCL share: the operations outside of the step, which block."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), Sharding.over(group.size()))
        self.group = group
        self.called = f"Rank {self.rank} of {self.shard_ranks}"
        """This rank in error texts."""
        self._in_flight: list[tuple[list[dist.Work], str]] = []
        """The messages of each collective started in this phase that are not waited for yet, and its name in errors."""

    @property
    def group_name(self) -> str:
        """The name of the process group, equal on all ranks."""
        return self.group.group_name

    def close(self) -> None:
        """End all waits on the connections of this group in an error, on both sides."""
        self.group.abort()

    def renew(self, made: dict[str, dist.ProcessGroup], generation: int) -> None:
        """Make new connections in place of closed ones.

        Raises:
            FxzeroError: the backend cannot.
        """
        raise FxzeroError("step_together() needs gloo: other backends cannot go on once a rank has failed.")

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        with self._named(f"an all-reduce of {tensor.numel()} elements"):
            self.group.allreduce([tensor], REDUCE_OPS[op]).wait()

    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        slices = None if full is None else list(as_bytes(full).chunk(self.shard_ranks))
        with self._named(f"a scatter of {shard.nbytes} bytes per rank"):
            dist.scatter(as_bytes(shard), slices, group=self.group, group_src=0)

    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        flat = tensor.detach().contiguous()
        with self._named(f"a broadcast of {flat.nbytes} bytes"):
            dist.broadcast(as_bytes(flat), group=self.group, group_src=0)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat)

    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        with self._named(f"an all-gather of {full.nbytes} bytes"):
            torch_internals.all_gather_base(self.group)(as_bytes(full), as_bytes(shard)).wait()

    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        slices = None if full is None else list(as_bytes(full).chunk(self.shard_ranks))
        with self._named(f"a gather of {shard.nbytes} bytes per rank"):
            dist.gather(as_bytes(shard), slices, group=self.group, group_dst=0)

    def drain(self) -> None:
        what = ""
        self.phases.waits += 1
        try:
            for works, what in self._in_flight:  # noqa: B007 (the error names it)
                for work in works:
                    work.wait()
                del works[:]
        except RuntimeError as error:
            raise self.lost(what, error) from error
        finally:
            self.phases.waits += 1
            del self._in_flight[:]

    def abandon(self) -> None:
        self.phases.waits += 1
        for works, _ in self._in_flight:
            for work in works:
                with contextlib.suppress(RuntimeError):
                    work.wait()
            del works[:]
        self.phases.waits += 1
        del self._in_flight[:]

    def what(self, word: str, payload: Payload) -> str:
        """A bound collective in error texts."""
        first, last = payload.fqns[0], payload.fqns[-1]
        names = first if first == last else f"{first} .. {last}"
        return f"the {word} of bucket {names} ({payload.nbytes / 2**20:.2f} MiB)"

    def lost(self, what: str, error: Exception, peer: int | None = None) -> FxzeroError:
        """The error to raise where waiting for peers ended in `error`, which the other ranks are told of.

        Args:
            peer: the rank in this group that was waited for, if it was one.
        """
        log, reason = self.phases, str(error).strip().splitlines()[0]
        if log.members:
            beats = heartbeat()
            stop = beats.explain(log)
            if stop is None and peer is not None and "closed" in reason:
                ranks = dist.get_process_group_ranks(self.group)
                stop = Stop(
                    "end", f"rank {ranks[peer]} has closed its connections: it has ended, or its own error says why."
                )
            beats.stop(log, stop or Stop("end", f"rank {log.rank} did not complete {what}: {reason}"))
            beats.linger(log)
            if stop is not None and stop.kind == "difference":
                return RankMismatchError(stop.text)
            if stop is not None and stop.kind == "failure" and log.is_together:
                return StepLeftOutError(
                    f"{stop.text}\nAll ranks leave this step out, and can go on with the next batch."
                )
            reason = reason if stop is None else stop.text
        return CommunicationError(
            f"{self.called} did not complete {what}: {reason}\n"
            "A peer has ended, or did not come within the process group's timeout: the first error among the other "
            "ranks says why. No rank can go on with this process group; restart from a checkpoint."
        )

    @contextlib.contextmanager
    def _named(self, what: str) -> Generator[None]:
        self.phases.waits += 1
        try:
            yield
        except RuntimeError as error:
            raise self.lost(what, error) from error
        finally:
            self.phases.waits += 1


def is_half(payload: Payload) -> bool:
    """True for gradients whose sum over ranks may overflow where their mean does not."""
    return payload.dtype is torch.float16


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8 [nbytes], which every backend can move; `tensor` is contiguous."""
    return tensor.detach().view(-1).view(torch.uint8)
