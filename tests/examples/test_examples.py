"""Each script of examples/ runs as it stands, with the ranks that torchrun would start."""

import contextlib
import io
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.launched import launched

from fxzero.testing import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(rank: int, world_size: int, name: str, folder: str, arguments: tuple[str, ...]) -> list[str]:
    """Worker: what a script prints, in a folder of its own."""
    os.chdir(folder)
    sys.argv = [name, *arguments]
    printed = io.StringIO()
    with launched(rank, world_size), contextlib.redirect_stdout(printed):
        if name == "two_nodes.py":
            os.environ["LOCAL_WORLD_SIZE"] = "2"
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return printed.getvalue().splitlines()


def test_plain_loop_runs(tmp_path: Path) -> None:
    lines, others = run_ranks(2, run, "plain_loop.py", str(tmp_path), ())
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1"]
    assert others == []


def test_two_nodes_run(tmp_path: Path) -> None:
    lines = run_ranks(4, run, "two_nodes.py", str(tmp_path), ())[0]
    assert len(lines) == 3


def test_resumed_run_goes_on_where_the_first_one_stopped(tmp_path: Path) -> None:
    whole = run_ranks(2, run, "save_and_resume.py", str(tmp_path), ("whole", "6"))[0]
    first = run_ranks(2, run, "save_and_resume.py", str(tmp_path), ("parts", "4"))[0]
    rest = run_ranks(2, run, "save_and_resume.py", str(tmp_path), ("parts", "6"))[0]
    assert [*first, *rest] == whole


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_lora_writes_adapters(tmp_path: Path) -> None:
    lines = run_ranks(2, run, "lora.py", str(tmp_path), ())[0]
    assert len(lines) == 5
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
def test_trainer_resumes_and_leaves_a_folder_to_push(tmp_path: Path) -> None:
    run_ranks(2, run, "hf_trainer.py", str(tmp_path), ("output",))
    run_ranks(2, run, "hf_trainer.py", str(tmp_path), ("output",))
    assert {"config.json", "model.safetensors", "checkpoint-2", "checkpoint-4"} <= set(os.listdir(tmp_path / "output"))
