"""Without the libraries of the extras all else works, and what needs them names the command that installs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxzero.host.extras import LIBRARIES, require

ROOT = Path(__file__).parents[2]
CURE = "pip install 'fxzero[train]'"
HIDE = f"import sys; sys.modules.update(dict.fromkeys({[*LIBRARIES['train'], 'transformers']!r}))\n"
"""The first line of a program for which these libraries are not installed."""
PLAN = """
import torch
from fxzero.planner import plan
schedule = plan(torch.nn.Linear(4, 4), torch.ones(2, 4), world_size=2)
print(schedule.memory)
"""


def run_without_extras(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a core installation."""
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD" not in name}
    command = [sys.executable, "-c", HIDE + program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_without_extras("from fxzero.__main__ import main; sys.exit(main())", *arguments)


def test_the_library_is_imported_when_no_extra_is_installed() -> None:
    ended = run_without_extras("import fxzero, fxzero.planner, fxzero.testing, fxzero.train, fxzero.__main__")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("ranks", [[], ["--nproc", "2"]], ids=["alone", "two ranks"])
def test_train_ends_with_the_cure_when_its_libraries_are_missing(ranks: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run_command("train", "--out", str(out), *ranks)
    assert ended.returncode == 2
    assert ended.stderr == (
        "fxzero train: this command needs libraries that are not installed "
        f"(matplotlib, safetensors, tokenizers, tqdm): {CURE}\n"
    )
    assert not out.exists()


def test_train_shows_its_help_when_its_libraries_are_missing() -> None:
    ended = run_command("train", "--help")
    assert ended.returncode == 0, ended.stderr
    assert "--preset NAME" in ended.stdout


def test_calibrate_measures_when_no_extra_is_installed(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    ended = run_command("calibrate", "--device", "cpu", "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    assert len(json.loads(out.read_text())) == 3


def test_a_plot_raises_the_cure_when_matplotlib_is_missing() -> None:
    ended = run_without_extras(
        f"{PLAN}\ntry: schedule.plot_memory('memory.png')\nexcept ImportError as error: print(error.name); raise"
    )
    assert "planned peak" in ended.stdout
    assert ended.stdout.endswith("\nmatplotlib\n"), ended.stderr
    assert ended.stderr.endswith(
        "fxzero.errors.MissingExtraError: plot_memory needs libraries that are not installed (matplotlib): "
        + CURE
        + "\n"
    )


def test_weights_of_a_run_raise_the_cure_when_safetensors_is_missing() -> None:
    ended = run_without_extras("from fxzero.train import load\nload('runs/none')")
    assert f"MissingExtraError: fxzero.train.load needs libraries that are not installed (safetensors): {CURE}" in (
        ended.stderr
    )


def test_nothing_is_refused_when_all_is_installed() -> None:
    require("a test", "train")
    require("a test", "train", "matplotlib")
