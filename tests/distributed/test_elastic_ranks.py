"""torchrun starts a job again of which a rank was killed inside of a step: it goes on as if nothing had happened."""

import logging
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fxzero.testing import run_ranks
from tests.distributed import elastic_workers

ROOT = Path(__file__).parents[2]


def losses_of(folder: Path) -> list[tuple[int, int, float]]:
    """Ranks, step and loss of each step that was taken, in order."""
    lines = [line.split() for line in (folder / "losses").read_text().splitlines()]
    return [(int(ranks), int(step), float(loss)) for ranks, step, loss in lines]


def straight(folder: Path, num_ranks: int, dropout: float) -> list[tuple[int, int, float]]:
    folder.mkdir()
    run_ranks(num_ranks, elastic_workers.train_on_ranks, str(folder), dropout)
    return losses_of(folder)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_job_goes_on_after_a_rank_was_killed(
    tmp_path: Path, num_ranks: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = straight(tmp_path / "straight", num_ranks, dropout=0.2)
    (tmp_path / "killed").mkdir()
    for name in ("TORCHELASTIC_SIGNALS_TO_HANDLE", "TORCHELASTIC_USE_AGENT_STORE"):  # which the launcher sets
        monkeypatch.setenv(name, "")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=1,
        monitor_interval=0.1,
        start_method="forkserver",
    )
    with caplog.at_level(logging.CRITICAL):
        elastic_launch(config, elastic_workers.train_under_torchrun)(str(tmp_path / "killed"), 1, 3, 0.2)
    assert len(expected) == elastic_workers.NUM_STEPS
    assert losses_of(tmp_path / "killed") == [*expected[:3], *expected[2:]]  # step 2 was not saved, and is taken again


@pytest.mark.exhaustive
@pytest.mark.parametrize("num_ranks", [(1, 1), (2, 1)])
def test_a_job_goes_on_with_one_rank_fewer(tmp_path: Path, num_ranks: tuple[int, int]) -> None:
    expected = straight(tmp_path / "straight", sum(num_ranks), dropout=0.0)
    folder = tmp_path / "killed"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    agents = [
        _agent(folder, port, number, is_host=not node, last=sum(num_ranks) - 1) for node, number in enumerate(num_ranks)
    ]
    try:
        assert agents[0].wait(timeout=200) == 0, (folder / "log").read_text()
        assert agents[1].wait(timeout=10) != 0
    finally:
        for agent in agents:
            agent.kill()
    found = losses_of(folder)
    assert [step for _, step, _ in found] == [0, 1, 2, 2, 3, 4]
    assert [ranks for ranks, *_ in found] == 3 * [sum(num_ranks)] + 3 * [num_ranks[0]]
    assert [loss for *_, loss in found] == pytest.approx(
        [loss for *_, loss in [*expected[:3], *expected[2:]]], rel=1e-6
    )


def _agent(folder: Path, port: int, num_ranks: int, *, is_host: bool, last: int) -> "subprocess.Popen[bytes]":
    """One of two nodes of torchrun, which notice each other's death within 3 s."""
    settings = f"is_host={int(is_host)},last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", str(num_ranks)]
    torchrun += ["--max-restarts", "3", "--monitor-interval", "0.1", "--local-addr", "127.0.0.1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", settings]
    script = str(ROOT / "tests" / "distributed" / "elastic_workers.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        arguments = [sys.executable, *torchrun, script, str(folder), str(last), "3", "0.0"]
        return subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
