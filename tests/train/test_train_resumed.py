"""A run of `fxzero train` that goes on from a checkpoint, as if nothing had happened."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fxzero.__main__ import main
from fxzero.commands.errors import CommandError
from fxzero.testing import run_ranks
from fxzero.train.batches import Batches, BatchStream, Windows
from tests.train.train_workers import train

SMALL = {"preset": "tiny", "seq": 32, "vocab_size": 300, "eval_batches": 1, "lr": 0.01, "warmup": 2, "log_every": 1}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; and so on.\n" * 1000)
    return path


def _losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("held_out_loss")) for line in lines]


def _forget(out: Path, checkpoint: int) -> None:
    """Make a run what it was when it had been killed after a checkpoint."""
    for path in [*out.iterdir(), *(out / "checkpoints").glob("0*")]:
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
        elif path.name.isdecimal() and int(path.name) > checkpoint:
            shutil.rmtree(path)


def test_alone_it_goes_on_bit_for_bit(data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "out"
    given = {**SMALL, "data": data, "precision": "fp16", "accumulate": 2, "batch": 2, "recompute": "full"}
    file = tmp_path / "file.toml"
    file.write_text("".join(f"{name} = {json.dumps(value, default=str)}\n" for name, value in given.items()))
    arguments = ["--config", str(file), "--out", str(out), "--save-every", "3", "--keep", "4", "--eval-every", "4"]
    assert main(["train", *arguments, "--steps", "7", "--memory-budget", "1GiB"]) == 0
    losses, weights = _losses(out), load_file(out / "model.safetensors")
    assert sorted(path.name for path in (out / "checkpoints").glob("0*")) == ["000001", "000002", "000003"]
    assert len(losses) == 7 + 3
    assert losses[-2] < losses[1]

    _forget(out, 1)
    assert main(["train", "--resume", str(out)]) == 0
    assert "going on after step 3, from " in capsys.readouterr().out
    assert _losses(out) == losses
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(out / "model.safetensors").items())

    (out / "model.safetensors").unlink()
    assert main(["train", "--resume", str(out), "--nproc", "1"]) == 0  # nothing is left to train
    assert _losses(out)[:-1] == losses
    assert main(["train", "--resume", str(out), "--preset", "mini"]) == 2
    assert "is of another model: missing" in capsys.readouterr().err
    assert main(["train", "--resume", str(out), "--seq", "16"]) == 2
    assert "its --seq was 32, and is 16" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_two_ranks_one_and_three_go_on_with_the_same_samples(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = {**SMALL, "model": "llama", "data": data, "batch": 3, "accumulate": 3, "eval_batches": 3}
    given |= {"save_every": 2, "keep": 9, "steps": 4}
    assert run_ranks(2, train, {**given, "out": out}, timeout=120) == [0, 0]
    losses = _losses(out)
    _forget(out, 1)
    for ranks in (1, 2, 3):
        again = tmp_path / f"at_{ranks}"
        resumed = {"resume": str(out), "out": again}
        assert run_ranks(ranks, train, resumed, timeout=120) == [0] * ranks
        for now, before in zip(_losses(again), losses, strict=True):
            assert now == before if ranks == 2 else math.isclose(now, before, rel_tol=1e-5)


def test_a_position_in_other_data_is_refused() -> None:
    def stream(rank: int, world_size: int, batch: int, seed: int = 0) -> BatchStream:
        windows = Windows(torch.arange(5, 1005, dtype=torch.int32), seq=9, seed=seed)
        return BatchStream(Batches(windows, batch, vocab_size=1005, masked=True, rank=rank, world_size=world_size))

    before, alone = stream(1, 2, 3), stream(0, 1, 6)
    for _ in range(50):
        next(before)
    alone.load_state_dict(before.state_dict())
    rest = [next(alone)["input_ids"] for _ in range(30)]  # past the end of the epoch
    assert torch.equal(torch.stack([next(before)["input_ids"] for _ in range(30)]), torch.stack(rest)[:, 3:])
    with pytest.raises(CommandError, match="position in other data: its --seed was 0, and is 1"):
        stream(0, 1, 6, seed=1).load_state_dict(before.state_dict())
