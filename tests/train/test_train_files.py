"""What `fxzero train` reads and writes beside the ordinary: pipes, odd names, full disks, damaged folders."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxzero.__main__ import main
from fxzero.checkpoint.safetensors import give_back_room, reserve_room
from fxzero.commands.errors import CommandError
from fxzero.errors import CheckpointError
from fxzero.train import corpus, load
from fxzero.train.corpus import read_corpus
from fxzero.train.options import TrainOptions
from fxzero.train.report import HeldOutMetrics, Metrics

LINES = "".join(f"line {number} of a text\n" for number in range(400))
SMALL = ["train", "--steps", "2", "--batch", "2", "--seq", "32", "--eval-batches", "1", "--log-every", "1"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(LINES)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(4 * LINES)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        assert main([*SMALL, "--data", str(folder / "text.txt"), "--out", str(folder / "out")]) == 0
    return folder / "out"


# -- what is read --------------------------------------------------------------------------------------------------


def test_only_files_are_read(data: Path) -> None:
    expected = read_corpus(data)
    os.mkfifo(data / "pipe")
    (data / "endless").symlink_to("/dev/zero")
    (data / "nowhere").symlink_to("missing")
    with (data / "sparse").open("wb") as file:
        file.truncate(2**40)
    assert read_corpus(data) == expected


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_a_name_that_is_no_text_is_read(data: Path) -> None:
    (data / os.fsdecode(b"a\xff.txt")).write_text(LINES)
    found = read_corpus(data)
    assert len({each.name for each in (*found.train, *found.held_out)}) == 5


def test_more_text_than_memory_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_memory_bytes", lambda: 4 * int(2.5 * len(LINES)))
    with pytest.raises(CommandError, match=r"--data .*2\.txt has 0\.0 GiB, and with the files before it"):
        read_corpus(data)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--seed", "9" * 24], "--seed 9+ must have at most 64 bits"),
        (["--seed", str(-(2**63) - 1)], "--seed .* must have at most 64 bits"),
        (["--vocab-size", "9" * 24], "--vocab-size 9+ must be at most 2147483647"),
        (["--weight-decay", "nan"], "--weight-decay nan must be at least 0"),
        (["--data", "/dev/null"], "--data /dev/null is a pipe or a device"),
        (["--data", "a" * 300], "--data a+ cannot be used: File name too long"),
        (["--out", "a" * 300], "--out a+ cannot be used: File name too long"),
    ],
)
def test_options_outside_of_their_range_are_told(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *options]) == 2
    with pytest.raises(AssertionError, match=f"^fxzero train: {told}"):
        raise AssertionError(capsys.readouterr().err)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_any_seed_of_64_bits_is_taken(seed: int) -> None:
    TrainOptions(seed=seed).validate()
    torch.Generator().manual_seed(seed)


def test_a_file_in_the_place_of_the_dumps_is_told(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXZERO_DUMP", str(data / "0.txt"))
    assert main([*SMALL, "--data", str(data), "--out", str(data.parent / "out")]) == 2
    assert "Let FXZERO_DUMP name a folder" in capsys.readouterr().err
    assert not (data.parent / "out").exists()


# -- what is written -----------------------------------------------------------------------------------------------


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_before_training(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", _no_room)
    out = data.parent / "out"
    assert main([*SMALL, "--data", str(data), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert f"cannot be written to {out}: No space left on device. Nothing was trained." in told
    assert not (out / "metrics.jsonl").read_text()
    assert not list(out.glob("*.partial"))


def test_a_disk_that_fails_at_the_end_is_told(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fxzero.train.job.draw_loss", _no_room)
    out = data.parent / "out"
    assert main([*SMALL, "--data", str(data), "--out", str(out)]) == 2
    assert "model.safetensors is complete." in capsys.readouterr().err
    load(out)


def test_room_that_a_killed_process_had_taken_is_given_back(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [tmp_path / f"file.{os.getppid()}.partial", tmp_path / "file.mine.partial"]
    for path in (*kept, tmp_path / f"file.{ended.pid}.partial"):
        path.touch()
    reserve_room(tmp_path / "file", {"a": torch.empty(8, device="meta")}, {})
    give_back_room(tmp_path / "file")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_room_is_taken_and_given_back(tmp_path: Path) -> None:
    path, specs = tmp_path / "file", {"a": torch.empty(2**18, device="meta")}
    reserve_room(path, specs, {})
    (partial,) = tmp_path.iterdir()
    assert partial.stat().st_size > 2**20
    assert partial.stat().st_blocks * 512 >= 2**20
    give_back_room(path)
    give_back_room(path)
    assert not list(tmp_path.iterdir())


def test_metrics_go_on_without_a_disk() -> None:
    with open("/dev/full", "w") as file:
        metrics = Metrics(file)
        for step in range(3):
            metrics.add(HeldOutMetrics(step, 1.0))
        metrics.close()
    assert len(metrics.held_out) == 3
    assert metrics.failure is not None
    assert metrics.failure.errno == errno.ENOSPC


# -- what is loaded ------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "name", ["config.json", "loss.png", "metrics.jsonl", "model.safetensors", "schedule.txt", "tokenizer.json"]
)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_bit_is_noticed(name: str, place: float, copied: Path) -> None:
    content = bytearray((copied / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    (copied / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is not what"):
        load(copied)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_or_shortened_file_is_named(name: str, copied: Path) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=f"{name} is not what"):
        load(copied)
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: No such file or directory"):
        load(copied)


def test_reports_may_be_removed(copied: Path) -> None:
    (copied / "loss.png").unlink()
    load(copied)


@pytest.mark.parametrize(
    "changed", [{"model": "bert"}, {"config": {"hidden_size": 3}}, {"config": 5}, {"preset": "x", "more": 1}]
)
def test_a_config_of_something_else_is_named(changed: dict[str, object], copied: Path) -> None:
    about = json.loads((copied / "config.json").read_text())
    del about["sha256"]
    (copied / "config.json").write_text(json.dumps(about))
    load(copied)  # a folder from before there were checksums
    (copied / "config.json").write_text(json.dumps(about | changed))
    with pytest.raises(CheckpointError, match="config.json is not what"):
        load(copied)
