"""A rank's place: its core, its network, and where it finds the others. Given as options, then taken."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence

from benchmarks.network.testbed import Network


class Loopback:
    """In the place of a testbed: the machine's own network, at its own speed, without root."""

    interface = "lo"

    def __init__(self, world_size: int = 2) -> None:
        self.world_size = world_size
        self.addresses = ["127.0.0.1"] * world_size

    def command(self, rank: int) -> list[str]:
        """As of a testbed: there is nothing to put before a command."""
        return []


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_places(command: Sequence[str], network: Network | Loopback, port: int) -> list[list[str]]:
    """The command of each rank: in its part of the network, with the options of its place.

    Args:
        port: of rank 0, one that nothing else on the network has.
    """
    cores = sorted(os.sched_getaffinity(0))
    common = ["--world-size", str(network.world_size), "--address", network.addresses[0], "--port", str(port)]
    common += ["--interface", network.interface]
    return [
        [*network.command(rank), *command, *common, "--rank", str(rank), "--core", str(cores[rank % len(cores)])]
        for rank in range(network.world_size)
    ]


def add_place(parser: argparse.ArgumentParser) -> None:
    """Let a command line have the options of a place."""
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--address", required=True, help="of rank 0")
    parser.add_argument("--port", type=int, required=True, help="of rank 0")
    parser.add_argument("--interface", required=True)


def take_place(place: argparse.Namespace, *, makes_group: bool = True) -> None:
    """Pin this process to its core, give it one thread, and join the others in a process group of gloo.

    Args:
        makes_group: False leaves the process group to others.
    """
    os.sched_setaffinity(0, {place.core})  # before torch, whose threads inherit it
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        "GLOO_SOCKET_IFNAME": place.interface,
        "DS_ACCELERATOR": "cpu",
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if makes_group:
        dist.init_process_group("gloo")
