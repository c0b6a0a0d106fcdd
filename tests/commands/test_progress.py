"""A command says what it does from the start, before it imports torch, and while nothing else happens."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxzero.commands import progress
from fxzero.commands.progress import Progress


def test_first_line_comes_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-m", "fxzero", "train"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (7, "fxzero train: importing torch\n")


def said_by(code: str) -> str:
    """What code writes in a new process."""
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_names_of_the_package_are_there_without_torch_before() -> None:
    code = (
        "import sys, fxzero; assert 'torch' not in sys.modules; fxzero.errors; assert 'torch' not in sys.modules;"
        "assert not hasattr(fxzero, 'nothing'); from fxzero import *; print(compile.__module__, fxzero.passes.__name__)"
    )
    assert said_by(code) == "fxzero.api fxzero.passes\n"


def test_what_is_slow_or_large_to_import_is_imported_where_it_is_needed() -> None:
    code = (
        "import sys, torch, fxzero; fxzero.compile; assert 'torch.distributed.tensor' not in sys.modules;"
        "fxzero.compile(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward();"
        "print('networkx' in sys.modules)"
    )
    assert said_by(code) == "False\n"


def test_a_stage_that_lasts_is_said_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.02)
    said = Progress("train")
    said.at("reading")
    time.sleep(0.3)
    said.at("building")
    said.stop()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["fxzero train: reading", "fxzero train: still reading, 0 s"]
    assert "fxzero train: building" in lines
    time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    said = Progress("train")
    said.at("reading")
    said.stop()
    assert capsys.readouterr().out == ""
