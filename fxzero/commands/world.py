"""The ranks of a run: joining those that there are, and the little they tell each other beside the training.

Alone there is one rank and no process group.
"""

import datetime
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from fxzero.commands.errors import CommandError

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")
"""What `joined` can be asked for."""

TIMEOUT_SECONDS = 600
"""How long a rank waits for the others."""


@dataclass(frozen=True)
class World:
    """One rank's view of the run."""

    rank: int
    size: int
    local_size: int
    """Ranks on this machine."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that reads, prints and writes."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; where that raises a CommandError, every rank raises it.

        Numbers and strings only: what is large goes through `share_tensor`.
        """
        box: list[object] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except CommandError as error:
                box[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise CommandError(box[1])
        return box[0]  # pyright: ignore[reportReturnType]

    def share_tensor(self, tensor: torch.Tensor | None, length: int) -> torch.Tensor:
        """Rank 0's int32 `[length]` on the CPU of every rank; the others pass None."""
        if self.size == 1:
            assert tensor is not None
            return tensor
        buffer = torch.empty(length, dtype=torch.int32) if tensor is None else tensor
        buffer = buffer.to(self.device)
        dist.broadcast(buffer, src=0)
        return buffer.cpu()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """A small value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        box: list[T | None] = [None] * self.size
        dist.all_gather_object(box, value)
        return box  # pyright: ignore[reportReturnType]


@contextmanager
def joined(device: str) -> Generator[World]:
    """Join the ranks that torchrun (or `launch`) started, or be alone; leave them at the end."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = World(rank, size, local_size, _choose_device(device, local_rank, local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    elif local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    if size == 1:
        yield world
        return
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS))
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _choose_device(device: str, local_rank: int, local_size: int) -> torch.device:
    """The device of this rank: with "auto" a GPU where each rank of the machine has one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_size else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if torch.cuda.device_count() < local_size:
        raise CommandError(f"--device cuda: {local_size} ranks on a machine with {torch.cuda.device_count()} GPUs.")
    return torch.device("cuda", local_rank)
