"""fxzero.save and fxzero.load on ranks: other numbers of them, other layouts, bit for bit at the same ones."""

import contextlib
import json
import logging
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import CheckpointError, FxzeroError
from fxzero.testing import engine_of
from tests.distributed.checkpoint_workers import build, differences, full_state, ids_of, optimizer_of


class Dropping(nn.Module):
    """Draws in each step."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, width), nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(self.norm(self.first(x)), 0.3)).square().mean()


def points(rank: int, step: int) -> Tensor:
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(100 * rank + step))


def make(seed: int, **options: Any) -> tuple[fxzero.ZeroModule, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Dropping()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return fxzero.compile(model, optimizer=optimizer, **options), optimizer


def train(zero: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, rank: int, steps: range) -> list[float]:
    losses: list[float] = []
    for step in steps:
        loss = zero(points(rank, step))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def goes_on_bit_for_bit(rank: int, world_size: int, folder: Path, how: str) -> None:
    """A run that was saved and a new one that loads: equal losses, weights and state, dropout and schedule included."""
    zero, optimizer = make(0, example=points(rank, 0), resume=folder)
    assert zero.resumed is None
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 6])
    torch.manual_seed(rank)
    train(zero, optimizer, scheduler, rank, range(3))
    extra = {"scheduler": scheduler.state_dict(), "step": 3, "rank": rank, "seen": torch.arange(rank + 1)}
    assert fxzero.save(folder, zero, optimizer, extra=extra) == folder / "000001"
    wanted = train(zero, optimizer, scheduler, rank, range(3, 7))

    resumed, other = make(5) if how == "load" else make(5, resume=folder, example=points(rank, 0))
    schedule = torch.optim.lr_scheduler.MultiStepLR(other, [4, 6])
    found = fxzero.load(folder, resumed, other) if how == "load" else resumed.resumed
    assert (found["step"], found["rank"]) == (3, rank)
    assert torch.equal(found["seen"], torch.arange(rank + 1))
    schedule.load_state_dict(found["scheduler"])
    assert train(resumed, other, schedule, rank, range(3, 7)) == wanted
    assert differences(full_state(zero, optimizer), full_state(resumed, other)) == []
    layouts = [[bucket.fqns for bucket in each.shards.layout.buckets] for each in map(_sharded, (zero, resumed))]
    assert layouts[0] == layouts[1]


def _sharded(zero: fxzero.ZeroModule) -> Any:
    return engine_of(zero).sharded


def save(rank: int, world_size: int, form: str, folder: Path) -> dict[str, Any]:
    model, optimizer = build(form, 0)
    assert isinstance(model, fxzero.ZeroModule)
    for step in range(3):
        model(ids_of(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    fxzero.save(folder, model, optimizer, extra=rank)
    return full_state(model, optimizer)


def load(rank: int, world_size: int, form: str, folder: Path, wanted: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fxzero.module.saved.load")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model, optimizer = build(form, 1)
    assert isinstance(model, fxzero.ZeroModule)
    assert fxzero.load(folder, model, optimizer) == (rank if world_size == 3 and form != "scalar" else 0)
    logger.removeHandler(handler)
    found = full_state(model, optimizer)
    if rank == 0:
        assert differences(wanted, found) == []
    model(ids_of(3)).backward()
    optimizer.step()
    return lines


def _saved(folder: Path, keep: int | None = None, times: int = 1) -> tuple[fxzero.ZeroModule, Any]:
    model, optimizer = build("example", 0)
    assert isinstance(model, fxzero.ZeroModule)
    for step in range(times):
        model(ids_of(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        fxzero.save(folder, model, optimizer, keep=keep)
    return model, optimizer


def damage(rank: int, world_size: int, folder: Path) -> None:
    """Each damage is refused by the name of the file on all ranks, and changes nothing."""
    model, optimizer = _saved(folder)
    before = full_state(model, optimizer)
    checkpoint = folder / "000001"
    names = ["manifest.json", *(f"rank_{each:05}.{kind}" for each in range(world_size) for kind in ("json", "bin"))]
    for name in names:
        path = checkpoint / name
        data = path.read_bytes()
        middle = len(data) // 2
        flipped = 1 if name.endswith("bin") else middle  # the middle of a binary file may lie between two blocks
        broken = {
            "is damaged|not a file": data[:flipped] + bytes([data[flipped] ^ 4]) + data[flipped + 1 :],
            "is truncated|is damaged|not a file": data[: middle - middle % 4],
            "cannot be read|is missing": None,
        }
        for text, content in broken.items():
            torch.distributed.barrier()
            if rank == 0:
                path.unlink() if content is None else path.write_bytes(content)
            torch.distributed.barrier()
            with pytest.raises(FxzeroError, match=text) as found:
                fxzero.load(folder, model, optimizer)
            assert name in str(found.value)
            torch.distributed.barrier()
            if rank == 0:
                path.write_bytes(data)
    assert differences(before, full_state(model, optimizer)) == []
    torch.distributed.barrier()
    fxzero.load(folder, model, optimizer)


def mismatches(rank: int, world_size: int, folder: Path) -> None:
    """What does not fit is named, with both shapes."""
    model, _ = _saved(folder)
    other = fxzero.compile(Dropping())
    with pytest.raises(CheckpointError, match=r"is of another model: missing \['model/first.bias"):
        fxzero.load(folder, other)
    small = fxzero.compile(Dropping())
    fxzero.save(folder / "small", small)
    with pytest.raises(CheckpointError, match=r"model/first.weight is \(10, 10\) in .* and \(11, 10\) in the model"):
        fxzero.load(folder / "small", fxzero.compile(Dropping(11)))
    with pytest.raises(CheckpointError, match=r"Optimizer 0 was a AdamW in .*, and is a SGD"):
        fxzero.load(folder, model, optimizer_of(model, "SGD"))
    with pytest.raises(CheckpointError, match=r"Group 0 of AdamW has other parameters, or in another order"):
        fxzero.load(folder, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        fxzero.load(folder / "nowhere", model)
    with pytest.raises(CheckpointError, match=r"extra\['f'\] is a builtins.function: a checkpoint holds numbers"):
        fxzero.save(folder, model, extra={"f": len.__class__ and mismatches})


def kept(rank: int, world_size: int, folder: Path) -> list[str]:
    """The newest checkpoints stay; what a crash left goes."""
    if rank == 0:
        folder.mkdir()
        (folder / ".000001.0a0b0c0d.partial").mkdir()
        (folder / ".000001.0a0b0c0d.partial" / "rank_00000.bin").write_bytes(b"x")
    torch.distributed.barrier()
    _saved(folder, keep=2, times=4)
    return sorted(path.name for path in folder.iterdir())


def full_disk(rank: int, world_size: int, folder: Path) -> None:
    """A rank that cannot write fails the save on all, and nothing else; saving in a thread is as good as waiting."""
    model, optimizer = _saved(folder, times=2)
    before = full_state(model, optimizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    with pytest.raises(FxzeroError if rank == 0 else OSError, match="File too large"):
        fxzero.save(folder, model, optimizer)
    torch.distributed.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["000001", "000002"]
    torch.distributed.barrier()  # before rank 0 makes the next folder
    failed = fxzero.async_save(folder, model, optimizer)
    with pytest.raises(FxzeroError if rank == 0 else OSError, match="File too large"):
        failed.result(20)
    torch.distributed.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["000001", "000002"]
    torch.distributed.barrier()  # before rank 0 makes the next folder
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    pending = fxzero.async_save(folder, model, optimizer, extra=rank, keep=2)
    model(ids_of(3)).backward()
    optimizer.step()
    assert pending.result(20) == folder / "000003"
    torch.distributed.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["000002", "000003"]
    torch.distributed.barrier()  # before rank 0 makes the next folder
    fxzero.async_save(folder, model, optimizer)
    assert fxzero.load(folder, model, optimizer) is None  # waits for the one that is being written
    assert fxzero.load(folder / "000003", model, optimizer) == rank
    assert differences(before, full_state(model, optimizer)) == []


def killed(rank: int, world_size: int, folder: Path, dies: int) -> None:
    """A rank dies: rank 1 while its slices are written, or rank 0 before the checkpoint has its name."""
    import fxzero.checkpoint.files as files
    import fxzero.module.saved.save as saving

    model, optimizer = _saved(folder)
    if rank == dies:
        module, name = (saving, "sync_folder") if dies else (files, "sync_folder")
        setattr(module, name, lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(FxzeroError):
        fxzero.save(folder, model, optimizer)
    assert json.loads((folder / "000001" / "manifest.json").read_text().splitlines()[1])["shard_ranks"] == world_size


def nearly_full_disk(rank: int, world_size: int, folder: Path, num_files: int) -> None:
    """A disk that has room for so many more files fails the save, and leaves nothing behind; then it has room again."""
    model, optimizer = _saved(folder / "run")
    before = full_state(model, optimizer)
    torch.distributed.barrier()
    if rank == 0:
        for number in range(os.statvfs(folder).f_favail - num_files):
            (folder / f"other{number}").touch()
    torch.distributed.barrier()
    for save in (fxzero.save, _saved_apart):
        with pytest.raises((FxzeroError, OSError), match=r"No space left|could not be written by rank"):
            save(folder / "run", model, optimizer)
        torch.distributed.barrier()
        assert sorted(path.name for path in (folder / "run").iterdir()) == ["000001"], save
        torch.distributed.barrier()  # before rank 0 makes the next folder
    if rank == 0:
        for path in folder.glob("other*"):
            path.unlink()
    torch.distributed.barrier()
    assert _saved_apart(folder / "run", model, optimizer) == folder / "run" / "000002"
    fxzero.load(folder / "run", model, optimizer)
    assert differences(before, full_state(model, optimizer)) == []


def _saved_apart(folder: Path, model: fxzero.ZeroModule, optimizer: torch.optim.Optimizer, **options: Any) -> Path:
    return fxzero.async_save(folder, model, optimizer, **options).result(20)


def fails_to_copy(rank: int, world_size: int, folder: Path) -> None:
    """A rank that cannot say what it has, or cannot copy it, fails the save on all, and leaves no folder behind."""
    model, optimizer = _saved(folder)
    torch.distributed.barrier()
    with pytest.raises(FxzeroError, match="extra is a builtins.object"):
        fxzero.async_save(folder, model, optimizer, extra=object() if rank == 1 else None)
    param = next(param for param in model.parameters() if param.numel())
    data = param.data
    if rank == 1:
        param.data = data.new_zeros(data.numel() + 1)
        with pytest.raises(FxzeroError, match="was replaced"):
            fxzero.async_save(folder, model, optimizer)
    else:
        with pytest.raises(FxzeroError, match="could not be written by rank 1"):
            _saved_apart(folder, model, optimizer)
    param.data = data
    torch.distributed.barrier()
    assert [path.name for path in folder.iterdir()] == ["000001"]


def saves_until_killed(rank: int, world_size: int, folder: Path, dies: int, seconds: float, is_apart: bool) -> None:
    """Go on with what is there, and save again and again, until a rank is killed at some moment."""
    model, optimizer = _saved(folder / "other")
    number = 0
    if any(folder.glob("run/0*")):
        number = fxzero.load(folder / "run", model, optimizer)
    torch.distributed.barrier()
    if rank == dies:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    save = _saved_apart if is_apart else fxzero.save
    with contextlib.suppress(FxzeroError, OSError):
        while True:
            number += 1
            _fill(model, number)
            save(folder / "run", model, optimizer, extra=number, keep=2)
            with (folder / f"saved_{rank}").open("a") as file:
                file.write(f"{number}\n")


def newest_number(rank: int, world_size: int, folder: Path) -> int:
    """The number of the newest checkpoint of `saves_until_killed`, whose weights are of the same save."""
    model, optimizer = build("lazy", 3)
    assert isinstance(model, fxzero.ZeroModule)
    number = fxzero.load(folder / "run", model, optimizer)
    assert all(bool((param == number).all()) for param in model.parameters())
    return number


def _fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
