"""`fxzero calibrate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fxzero
from fxzero.__main__ import main
from fxzero.cost import Cluster


def test_one_rank_measures_its_device(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    assert main(["calibrate", "--device", "cpu", "--out", str(out)]) == 0
    flops_per_s, bytes_per_s, op_s = json.loads(out.read_text())
    assert flops_per_s > 1e8
    assert bytes_per_s > 1e8
    assert 0 < op_s < 1e-2


def test_two_ranks_print_a_cluster_that_compile_takes(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "fxzero", "calibrate", "--nproc", "2", "--device", "cpu", "--out", str(out)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    (line,) = (line for line in printed.splitlines() if line.startswith("cluster="))
    cluster = eval(line.removeprefix("cluster="), {"fxzero": fxzero})
    assert cluster == Cluster.of_numbers(json.loads(out.read_text()))
    assert "Gbit/s" in printed
