"""Bytes a second of `fxzero.save` and `fxzero.load` against plain writes and reads, and torch's own checkpoints.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpoint --folder /a/folder/on/the/disk
    OMP_NUM_THREADS=1 python -m benchmarks.checkpoint --folder /a/folder/on/the/disk --small

Two ranks save a model with AdamW's state. In turns: each rank writes and syncs its bytes to one file, and reads it;
fxzero saves and loads; torch.distributed.checkpoint does. Before each read the files' pages are dropped from the cache.
The last columns are bytes a second relative to those of plain files and of torch: more is faster.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tabulate import tabulate
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import fxzero
from benchmarks.about import heading
from fxzero.testing import run_ranks


class Parameters(nn.Module):
    """Parameters of one size."""

    def __init__(self, number: int, numel: int) -> None:
        super().__init__()
        self.list = nn.ParameterList(nn.Parameter(torch.randn(numel)) for _ in range(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A sum that reaches all of them."""
        return torch.stack([param.sum() for param in self.list]).sum() * x


def _seconds(work: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def _drop(folder: Path) -> None:
    """Let the pages of all files leave the cache."""
    dist.barrier()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


def measure(rank: int, world_size: int, root: Path, num_params: int, numel: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, a number a round; and the bytes of all ranks."""
    torch.manual_seed(0)
    model = Parameters(num_params, numel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    zero = fxzero.compile(model, optimizer=optimizer)
    zero.state_dict(rank0_only=True)  # fixes the layout without a trace
    for param in zero.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    own = [param.detach() for param in zero.parameters()]
    own += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    flat = torch.cat([each.reshape(-1) for each in own])
    into = flat.clone()  # a plain read has its memory already; fxzero.load and dcp.load make theirs
    found: dict[str, list[float]] = {"bytes": [float(flat.nbytes) * world_size]}

    def write() -> None:
        with (root / f"plain_{rank}").open("wb", buffering=0) as file:
            data, sent = flat.view(torch.uint8).numpy().data, 0
            while sent < len(data):
                sent += file.write(data[sent:])
            os.fsync(file.fileno())

    def read() -> None:
        with (root / f"plain_{rank}").open("rb", buffering=0) as file:
            data, got = into.view(torch.uint8).numpy().data, 0
            while got < len(data) and (count := file.readinto(data[got:])):
                got += count

    def states() -> dict[str, object]:
        weights, state = get_state_dict(zero, optimizer)
        return {"model": weights, "optim": state}

    ways: dict[str, Callable[[], object]] = {
        "plain write": write,
        "plain read": read,
        "fxzero.save": lambda: fxzero.save(root / "own", zero, optimizer, keep=1),
        "fxzero.load": lambda: fxzero.load(root / "own", zero, optimizer),
        "dcp.save": lambda: dcp.save(states(), checkpoint_id=root / "dcp"),
        "dcp.load": lambda: dcp.load(states(), checkpoint_id=root / "dcp"),
    }
    for _ in range(rounds):
        for name, work in ways.items():
            if name == "dcp.save" and rank == 0:
                shutil.rmtree(root / "dcp", ignore_errors=True)
            if "read" in name or "load" in name:
                _drop(root)
            found.setdefault(name, []).append(_seconds(work))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--num-params", type=int, default=100)
    parser.add_argument("--numel", type=int, default=1_000_000)
    parser.add_argument("--small", action="store_true", help="2,000 parameters of 500 elements")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    num_params, numel = (2000, 500) if options.small else (options.num_params, options.numel)
    root = options.folder / "fxzero-benchmark"
    root.mkdir(parents=True)
    try:
        arguments = (root, num_params, numel, options.rounds)
        found = run_ranks(2, measure, *arguments, timeout=3600, group_timeout=600)[0]
    finally:
        shutil.rmtree(root)
    (nbytes,) = found.pop("bytes")
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    rows: list[tuple[str, float, float, float, float, float]] = []
    for name, median in medians.items():
        writes = "write" in name or "save" in name
        plain, torchs = (
            medians["plain write" if writes else "plain read"],
            medians["dcp.save" if writes else "dcp.load"],
        )
        rows.append((name, median, min(found[name]), nbytes / median / 1e6, plain / median, torchs / median))
    print(heading(f"python -m benchmarks.checkpoint{' --small' * options.small}"))
    headers = ("", "median s", "best s", "MB/s", "MB/s of plain", "MB/s of torch's")
    print(tabulate(rows, headers=headers, floatfmt=".3g"))


if __name__ == "__main__":
    main()
