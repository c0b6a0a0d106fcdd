"""`fxzero train` as a whole: alone in this process, and with ranks that it starts itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from fxzero.__main__ import main
from fxzero.train import load

FILES = {"config.json", "loss.png", "metrics.jsonl", "model.safetensors", "schedule.txt", "tokenizer.json"}
SMALL = (
    *("--preset", "tiny", "--seq", "32", "--vocab-size", "300", "--batch", "4", "--eval-batches", "2"),
    *("--lr", "0.01", "--warmup", "5", "--log-every", "5"),
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Some forty files of text that is easily learned."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index:02}.txt").write_text("the quick brown fox jumps over the lazy dog; and so on.\n" * 20)
    return folder


def _held_out_losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


def _predict(out: Path) -> None:
    """The results are usable together: tokenizer and weights load, and the model runs."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("the quick brown fox").ids])
    logits = load(out)(input_ids=ids).logits
    assert logits.shape == (*ids.shape, tokenizer.get_vocab_size())
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("model", ["roberta", "gpt", "llama"])
def test_alone_it_learns_and_writes_everything(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--steps", "30", "--eval-every", "10", "--accumulate", "2", "--out", str(out)]
    assert main(["train", "--model", model, *SMALL, *arguments]) == 0
    assert {path.name for path in out.iterdir()} == FILES
    losses = _held_out_losses(out)
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
    printed = capsys.readouterr().out
    assert "The schedule of a step:" in printed
    assert "peak memory      rank 0:" in printed
    assert "world_size=1" in (out / "schedule.txt").read_text()
    _predict(out)


def test_ranks_that_it_starts_itself_learn_together(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--steps", "30", "--out", str(out), "--nproc", "2"]
    run = _start([*SMALL, *arguments])
    printed, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert {path.name for path in out.iterdir()} == FILES
    losses = _held_out_losses(out)
    assert losses[-1] < 0.7 * losses[0]
    assert "over 2 ranks on cpu: 30 steps of 256 tokens" in printed
    assert "rank 1:" in printed
    assert "world_size=2" in (out / "schedule.txt").read_text()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-2]["gathered_bytes"] > 0
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["lm_head.weight"] == "embeddings.word.weight"
    _predict(out)


@pytest.mark.exhaustive
def test_interrupted_it_writes_what_it_has(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--steps", "100000", "--out", str(out), "--nproc", "2"]
    run = _start([*SMALL, *arguments])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and '"loss"' not in _text(out / "metrics.jsonl"):
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    printed, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT, errors
    assert "of 100000 steps; writing what there is" in printed
    assert {path.name for path in out.iterdir()} == FILES
    _predict(out)


@pytest.mark.exhaustive
def test_ranks_stop_together_with_the_error_of_the_one_that_reads(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short\n")
    run = _start([*SMALL, "--data", str(tmp_path / "short.txt"), "--out", str(tmp_path / "out"), "--nproc", "2"])
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert errors.count("fxzero train: The training text has") == 1
    assert "Traceback" not in errors


def test_options_that_do_not_fit_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "nano"]) == 2
    assert capsys.readouterr().err.startswith("fxzero train: --preset nano is not known for roberta; choose one of: ")


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD" not in name}
    command = [sys.executable, "-m", "fxzero", "train", *arguments]
    root = Path(__file__).parents[2]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=root, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=pipe, stderr=pipe, text=True
    )


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_before_the_first_step_an_interrupt_ends_it_at_once(data: Path, tmp_path: Path) -> None:
    run = _start([*SMALL, "--data", str(data), "--out", str(tmp_path / "out")])
    assert run.stdout is not None
    assert run.stdout.readline() == "fxzero train: importing torch\n"
    assert "fxzero train: tracing and planning the first steps\n" in run.stdout  # reads up to there
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=10)
    assert run.returncode == -signal.SIGINT
    assert "Traceback" not in errors
