"""Network namespaces joined by throttled links: one for each rank, two joined directly, more by a bridge.

What a rank sends passes a token bucket (`tc tbf`) of the link's rate on its own interface.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.about import ROOT

_PREFIX = "fxzero-bench-"


class CannotRunHere(RuntimeError):
    """This machine has not what the testbed needs."""


def missing(world_size: int = 2, *, shares_cores: bool = False) -> list[str]:
    """What the testbed needs and does not find, one sentence each.

    Args:
        shares_cores: ranks need no core each.
    """
    found: list[str] = []
    if platform.system() != "Linux":
        return [f"The system is {platform.system()}; network namespaces need Linux."]
    if os.geteuid() != 0:
        found.append("It is not root, which network namespaces and rate limits need.")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            found.append(f"There is no program {program!r}; install iproute2.")
    cores = len(os.sched_getaffinity(0))
    if cores < world_size and not shares_cores:
        found.append(f"It has {cores} core(s); each of {world_size} ranks needs one of its own.")
    return found


def check(world_size: int = 2, *, shares_cores: bool = False) -> None:
    """Raise CannotRunHere if something is missing."""
    if reasons := missing(world_size, shares_cores=shares_cores):
        raise CannotRunHere("The testbed cannot run here.\n" + "\n".join(reasons))


def burst_bytes(gbit_per_s: float) -> int:
    """The bucket of tokens: what a millisecond carries, at least 128 kB, which is two of the kernel's large packets."""
    return max(128_000, round(gbit_per_s * 1e9 / 8 * 1e-3))


class Network:
    """The namespaces and their links, from `with` to its end.

    Args:
        prefix: of the names of the namespaces.
        shares_cores: ranks need no core each.

    Raises:
        CannotRunHere: the machine lacks something, or the kernel refuses.
    """

    interface = "wire"
    """Of every rank, in its own namespace."""

    def __init__(self, world_size: int = 2, *, prefix: str = _PREFIX, shares_cores: bool = False) -> None:
        check(world_size, shares_cores=shares_cores)
        self.world_size = world_size
        self._prefix = prefix
        self._own = f"{prefix}{os.getpid()}-"
        self.namespaces = [f"{self._own}{rank}" for rank in range(world_size)]
        self.addresses = [f"10.98.7.{rank + 1}" for rank in range(world_size)]

    def __enter__(self) -> Network:
        _remove_leftovers(self._prefix)
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the namespaces, and with them the links."""
        for name in _namespaces(self._own):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def command(self, rank: int) -> list[str]:
        """What to put before a command so that it runs on a rank's network."""
        return ["ip", "netns", "exec", self.namespaces[rank]]

    def run_ranks(self, command: Sequence[str], timeout: float) -> list[dict[str, Any]]:
        """Run one program in all ranks, which finds its place in the variables of torchrun.

        Returns:
            The JSON objects, one a line, that the first rank printed.

        Raises:
            SystemExit: a rank failed.
        """
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), WORLD_SIZE=str(self.world_size))
        environment |= {"MASTER_ADDR": self.addresses[0], "MASTER_PORT": "29541", "GLOO_SOCKET_IFNAME": self.interface}
        ranks = [
            subprocess.Popen(
                [*self.command(rank), *command],
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
                cwd=ROOT,
                env=environment | {"RANK": str(rank)},
            )
            for rank in range(self.world_size)
        ]
        try:
            printed, _ = ranks[0].communicate(timeout=timeout)
            if any(rank.wait(30) for rank in ranks):
                raise SystemExit("A rank failed; what it said is above.")
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]

    def set_rate(self, gbit_per_s: float) -> None:
        """Limit what each rank sends. A queue of 50 ms paces TCP instead of dropping its packets."""
        for name in self.namespaces:
            limit = f"rate {gbit_per_s * 1000:g}mbit burst {burst_bytes(gbit_per_s)} latency 50ms"
            _run(f"tc -n {name} qdisc replace dev {self.interface} root tbf {limit}")

    def set_rate_of_ports(self, gbit_per_s: float) -> None:
        """Limit what each rank receives too, as the port of a switch does; three ranks or more."""
        limit = f"rate {gbit_per_s * 1000:g}mbit burst {burst_bytes(gbit_per_s)} latency 50ms"
        for rank in range(self.world_size):
            _run(f"tc -n {self._own}bridge qdisc replace dev port{rank} root tbf {limit}")

    def _make(self) -> None:
        for name in self.namespaces:
            _run(f"ip netns add {name}")
        if self.world_size == 2:
            first, second = self.namespaces
            _run(f"ip link add {self.interface} netns {first} type veth peer name {self.interface} netns {second}")
        else:
            self._make_bridge()
        for name, address in zip(self.namespaces, self.addresses, strict=True):
            _run(f"ip -n {name} addr add {address}/24 dev {self.interface}")
            _run(f"ip -n {name} link set lo up")
            _run(f"ip -n {name} link set {self.interface} up")

    def _make_bridge(self) -> None:
        middle = f"{self._own}bridge"
        _run(f"ip netns add {middle}")
        _run(f"ip -n {middle} link add bridge type bridge")
        _run(f"ip -n {middle} link set bridge up")
        for rank, name in enumerate(self.namespaces):
            _run(f"ip link add {self.interface} netns {name} type veth peer name port{rank} netns {middle}")
            _run(f"ip -n {middle} link set port{rank} master bridge up")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise CannotRunHere(f"The testbed cannot run here: `{command}` failed: {said}")


def _namespaces(prefix: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(prefix)]


def _remove_leftovers(prefix: str) -> None:
    """Remove the namespaces of runs that were killed."""
    for name in _namespaces(prefix):
        owner = name[len(prefix) :].split("-")[0]
        if not Path("/proc", owner).exists():
            subprocess.run(["ip", "netns", "del", name], check=False)
