"""The rank processes of one system, seen from the driver."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.network.place import Loopback, in_places
from benchmarks.network.systems import Shape
from benchmarks.network.testbed import Network
from benchmarks.ranks import Ranks


class World(Ranks):
    """All ranks of a system.

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
        command = [sys.executable, "-m", "benchmarks.network.rank", "--system", system, *more]
        command += ["--shape", json.dumps(asdict(shape))]
        super().__init__(system, in_places(command, network, port), logs, timeout_s=timeout_s)
