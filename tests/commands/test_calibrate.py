"""`fxzero calibrate`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxzero
from fxzero.__main__ import main
from fxzero.cost.calibrate import _seconds_of
from fxzero.cost.model import Cluster


def test_one_rank_measures_its_device(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    assert main(["calibrate", "--device", "cpu", "--out", str(out)]) == 0
    flops_per_s, bytes_per_s, op_s = json.loads(out.read_text())
    assert flops_per_s > 1e8
    assert bytes_per_s > 1e8
    assert 0 < op_s < 1e-2


def cluster_in(printed: str, out: Path) -> Cluster:
    """The cluster that ranks printed for `compile`, and wrote."""
    (line,) = (line for line in printed.splitlines() if line.startswith("cluster="))
    cluster = eval(line.removeprefix("cluster="), {"fxzero": fxzero})
    assert cluster == Cluster.of_numbers(json.loads(out.read_text()))
    assert (cluster.inside is not None) == ("inside a node" in printed)
    assert "Gbit/s" in printed
    return cluster


@pytest.mark.exhaustive
def test_nodes_print_a_cluster_that_compile_takes(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    options = ["--nproc", "4", "--nodes", "2", "--device", "cpu", "--out", str(out)]
    command = [sys.executable, "-m", "fxzero", "calibrate", *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert cluster_in(printed, out).inside is not None


def test_nodes_must_divide_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--nodes", "3", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "fxzero calibrate: --nodes 3 does not divide 1 ranks.\n"


@pytest.mark.parametrize(("call_s", "num_calls"), [(0.1, 1 + 9), (0.001, 1 + 2 + 4 + 8 + 9 * 8)])
def test_a_call_is_timed_in_few_batches_of_which_slow_ones_do_not_count(
    call_s: float, num_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, now = 0, 0.0

    def run() -> None:
        nonlocal calls, now
        calls += 1
        now += call_s + (7.0 if calls > num_calls // 2 and calls % 5 == 0 and call_s > 0.01 else 0.0)

    monkeypatch.setattr("fxzero.cost.calibrate.time.perf_counter", lambda: now)
    assert _seconds_of(run, torch.device("cpu")) == pytest.approx(call_s)
    assert calls == num_calls
