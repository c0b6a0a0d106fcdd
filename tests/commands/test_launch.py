"""Ranks that a command starts listen to this machine alone, and do what they were started for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from fxzero.commands.rendezvous import ADDRESS, LoopbackRendezvous
from tests.commands.test_calibrate import cluster_in

LOOPBACK = "0100007F"
"""127.0.0.1 as the kernel prints it."""
LISTENING = "0A"
pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")


def _listening(pids: list[int]) -> set[str]:
    """The addresses at which processes listen."""
    inodes: set[str] = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {row[1].split(":")[0] for row in rows if row[3] == LISTENING and row[9] in inodes}


def _with_children(pid: int) -> list[int]:
    children = [Path(task, "children") for task in Path(f"/proc/{pid}/task").glob("*")]
    try:
        return [
            pid,
            *(each for path in children for child in path.read_text().split() for each in _with_children(int(child))),
        ]
    except OSError:
        return [pid]


def test_ranks_meet_on_the_loopback() -> None:
    met = LoopbackRendezvous("run").next_rendezvous()
    assert _listening([os.getpid()]) >= {LOOPBACK}
    about = met.bootstrap_store_info
    assert about is not None
    assert about.master_addr == ADDRESS
    met.store.set("key", "value")
    assert TCPStore(ADDRESS, about.master_port).get("run/key") == b"value"


def test_started_ranks_listen_on_the_loopback_alone(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD" not in name}
    environment["OMP_NUM_THREADS"] = "1"
    options = ["--nproc", "2", "--device", "cpu", "--out", str(out)]
    command = [sys.executable, "-m", "fxzero", "calibrate", *options]
    run = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, text=True)
    found: set[str] = set()
    while run.poll() is None:
        found |= _listening(_with_children(run.pid))
        time.sleep(0.05)
    printed, _ = run.communicate()
    assert run.returncode == 0
    assert found == {LOOPBACK}
    assert cluster_in(printed, out).inside is None
