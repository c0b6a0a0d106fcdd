"""The rank processes of one system, seen from the driver."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.about import ROOT
from benchmarks.network.systems import Shape
from benchmarks.network.testbed import Network


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RankDied(RuntimeError):
    """A rank ended or did not answer in time; the message has the end of what it wrote."""


class Loopback:
    """In the place of a testbed: the machine's own network, at its own speed, without root."""

    interface = "lo"

    def __init__(self, world_size: int = 2) -> None:
        self.world_size = world_size
        self.addresses = ["127.0.0.1"] * world_size

    def command(self, rank: int) -> list[str]:
        """As of a testbed: there is nothing to put before a command."""
        return []


class World:
    """All ranks of a system: started, told what to do together, ended.

    Args:
        port: of rank 0, one that no other system of the testbed has.
        logs: the folder for what the ranks write to stderr.
        more: further options of the rank's command line.
        timeout_s: how long an answer may take.
    """

    def __init__(
        self,
        system: str,
        network: Network | Loopback,
        port: int,
        logs: Path,
        shape: Shape,
        more: Sequence[str] = (),
        timeout_s: float = 600,
    ) -> None:
        self.system, self._timeout_s = system, timeout_s
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        cores = sorted(os.sched_getaffinity(0))
        command = [sys.executable, "-m", "benchmarks.network.rank", "--system", system, *more]
        command += ["--world-size", str(network.world_size), "--address", network.addresses[0], "--port", str(port)]
        command += ["--interface", network.interface, "--shape", json.dumps(asdict(shape))]
        self._logs = [logs / f"{system}.{rank}.log" for rank in range(network.world_size)]
        self._ranks: list[subprocess.Popen[str]] = []
        for rank, log in enumerate(self._logs):
            with log.open("w") as errors:
                process = subprocess.Popen(
                    [*network.command(rank), *command, "--rank", str(rank), "--core", str(cores[rank % len(cores)])],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    cwd=ROOT,
                    env=environment,
                    start_new_session=True,
                )
            self._ranks.append(process)
        self.sessions = {process.pid for process in self._ranks}
        """Of the ranks and of what they start."""

    def wait_until_ready(self) -> list[dict[str, Any]]:
        """Each rank's first answer, in rank order."""
        return [self._answer(rank) for rank in range(len(self._ranks))]

    def ask(self, do: str, **arguments: Any) -> list[Any]:
        """Tell all ranks the same; their answers, in rank order.

        Raises:
            RankDied: a rank gave none.
        """
        for rank, process in enumerate(self._ranks):
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
                process.stdin.flush()
            except OSError:
                self._answer(rank)
        return [self._answer(rank) for rank in range(len(self._ranks))]

    def close(self) -> None:
        """End the ranks: they are told to, and killed where they do not."""
        for process in self._ranks:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.write('{"do": "quit"}\n')
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._ranks:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def _answer(self, rank: int) -> Any:
        stdout = self._ranks[rank].stdout
        assert stdout is not None
        readable, _, _ = select.select([stdout], [], [], self._timeout_s)
        line = stdout.readline() if readable else ""
        if not line:
            why = "ended" if readable else f"did not answer within {self._timeout_s:.0f} s"
            end = "\n".join(self._logs[rank].read_text(errors="replace").splitlines()[-8:])
            raise RankDied(f"Rank {rank} of {self.system} {why}; {self._logs[rank]} ends with:\n{end}")
        return json.loads(line)
