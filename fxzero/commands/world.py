"""The ranks of a run: joining those that there are, and the little they tell each other beside the training.

Alone there is one rank and no process group.
"""

import argparse
import datetime
import json
import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fxzero.comm.rendezvous import init_process_group
from fxzero.commands.errors import CommandError, OwnError, report
from fxzero.commands.launch import launch, under_torchrun
from fxzero.errors import CommunicationError

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

        Numbers, strings and lists of them only (a tuple arrives as a list): what is large goes through `share_tensor`.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = make()
            except CommandError as error:
                failure = error
        told = self._from_rank(0, [result, None if failure is None else str(failure)])
        if told[1] is not None:
            raise CommandError(told[1]) from failure
        return told[0]

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
        """A small value of every rank, on every rank: of numbers, strings, lists and dicts."""
        return [self._from_rank(rank, value) for rank in range(self.size)]

    def _from_rank(self, source: int, value: Any) -> Any:
        """A value of one rank on every rank, sent as JSON: what other processes send is never unpickled."""
        if self.size == 1:
            return value
        data = torch.tensor([*json.dumps(value).encode()], dtype=torch.uint8, device=self.device)
        length = torch.tensor(len(data), device=self.device)
        dist.broadcast(length, src=source)
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, src=source)
        return json.loads(bytes(data.tolist()))


@contextmanager
def joined(device: str) -> Generator[World]:
    """Join the ranks that torchrun (or `launch`) started, or be alone; leave them at the end."""
    rank, size = _place("RANK", "WORLD_SIZE")
    local_rank, local_size = _place("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    world = World(rank, size, local_size, _choose_device(device, local_rank, local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    elif local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    if size == 1:
        yield world
        return
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    with _told_how_to_meet():
        init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS))
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _place(rank_name: str, size_name: str) -> tuple[int, int]:
    """A rank and the number of ranks, from the environment: (0, 1) where nothing is set.

    Raises:
        OwnError: they are no numbers, or not such numbers.
    """
    rank, size = _number(rank_name, 0), _number(size_name, 1)
    if size < 1 or not 0 <= rank < size:
        raise OwnError(
            f"The environment says {rank_name}={rank} and {size_name}={size}; ranks count from 0 to one less "
            "than their number. Start ranks with torchrun or --nproc, or unset both."
        )
    if size > 1 and rank_name not in os.environ:
        raise OwnError(f"{size_name} is {size}, but {rank_name} is not set. Start ranks with torchrun or --nproc.")
    return rank, size


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.strip().lstrip("+-").isdecimal():
        raise OwnError(f"{name} is {text!r} in the environment; it must be a number, as torchrun sets it.")
    return int(text)


@contextmanager
def _told_how_to_meet() -> Generator[None]:
    """Check the address at which ranks meet, and raise OwnError where they cannot meet there in the block."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    meeting = f"MASTER_ADDR={address} and MASTER_PORT={port}"
    start = "Start the ranks with torchrun or --nproc, which set them, or set both on all ranks."
    if not address or not port:
        raise OwnError(f"Ranks meet at MASTER_ADDR and MASTER_PORT, and the environment says {meeting}. {start}")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise OwnError(f"MASTER_PORT is {port!r} in the environment; it must be the number of a port. {start}")
    try:
        socket.getaddrinfo(address, int(port))
        yield
    except (OSError, RuntimeError, ValueError, CommunicationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OwnError(f"Ranks cannot meet at {meeting}: {reason}. {start}") from error


def _choose_device(device: str, local_rank: int, local_size: int) -> torch.device:
    """The device of this rank: with "auto" a GPU where each rank of the machine has one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_size else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if torch.cuda.device_count() < local_size:
        raise CommandError(f"--device cuda: {local_size} ranks on a machine with {torch.cuda.device_count()} GPUs.")
    return torch.device("cuda", local_rank)


def run_on_ranks(
    command: str, arguments: argparse.Namespace, argv: list[str], run: Callable[[argparse.Namespace, World], int]
) -> int:
    """Start the ranks that `--nproc` asks for, or join those that there are, and run a command; its exit status."""
    try:
        if (arguments.nproc or 1) > 1 and not under_torchrun():
            return launch(arguments.nproc, argv)
        with joined(arguments.device) as world:
            return run(arguments, world)
    except CommandError as error:
        return report(command, error)
