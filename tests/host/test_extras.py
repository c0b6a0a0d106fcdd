"""Without the libraries of the extras all else works, and what needs them names the command that installs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fxzero.host.extras import LIBRARIES, require

ROOT = Path(__file__).parents[2]
CURE = "pip install 'fxzero[train]'"
HIDE = f"import sys; sys.modules.update(dict.fromkeys({[*LIBRARIES['train'], 'transformers']!r}))\n"
"""The first line of a program for which these libraries are not installed."""
LIBRARY = """
import torch
import fxzero, fxzero.planner, fxzero.testing, fxzero.train, fxzero.__main__

schedule = fxzero.planner.plan(torch.nn.Linear(4, 4), torch.ones(2, 4), world_size=2)
print(schedule.memory)
try:
    schedule.plot_memory("memory.png")
except ImportError as error:
    print(error.name, f"{type(error).__name__}: {error}", sep="\\n")
try:
    fxzero.train.load("runs/none")
except ImportError as error:
    print(f"{type(error).__name__}: {error}")
"""
TRAIN = """
from fxzero.__main__ import main

assert main(sys.argv[1:]) == 2
assert main([*sys.argv[1:], "--nproc", "2"]) == 2
"""
HELP_AND_CALIBRATE = """
from fxzero.__main__ import main

try:
    main(["train", "--help"])
except SystemExit as ended:
    assert ended.code == 0
sys.exit(main(["calibrate", *sys.argv[1:]]))
"""


def run_without_extras(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a core installation."""
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD" not in name}
    command = [sys.executable, "-c", HIDE + program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_library_works_but_for_what_needs_the_extras() -> None:
    """One program: it imports everything, plans, and is told what a plot and the weights of a run need."""
    ended = run_without_extras(LIBRARY)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stderr
    assert any("planned peak" in line for line in lines)
    assert lines[-3:] == [
        "matplotlib",
        f"MissingExtraError: plot_memory needs libraries that are not installed (matplotlib): {CURE}",
        f"MissingExtraError: fxzero.train.load needs libraries that are not installed (safetensors): {CURE}",
    ]


def test_train_ends_with_the_cure_when_its_libraries_are_missing(tmp_path: Path) -> None:
    """Alone, and where it would start two ranks."""
    out = tmp_path / "out"
    ended = run_without_extras(TRAIN, "train", "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == 2 * (
        "fxzero train: this command needs libraries that are not installed "
        f"(matplotlib, safetensors, tokenizers, tqdm): {CURE}\n"
    )
    assert not out.exists()


def test_help_of_train_and_calibrate_need_no_extra(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    ended = run_without_extras(HELP_AND_CALIBRATE, "--device", "cpu", "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    assert "--preset NAME" in ended.stdout
    assert len(json.loads(out.read_text())) == 3


def test_nothing_is_refused_when_all_is_installed() -> None:
    require("a test", "train")
    require("a test", "train", "matplotlib")
