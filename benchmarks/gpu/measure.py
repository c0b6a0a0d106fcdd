"""One rank of a table: every system in turn, a line of JSON for each.

    python -m benchmarks.gpu.measure '{"work": {...}, "systems": [...], "device": "cuda", "until": 1.7e9, "steps": 8}'

Nothing is started once the time is over, so that all tables come in a fixed time.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.systems import Work, make

WARM_STEPS = 6
BLOCKS = 3
"""Runs of steps back to back; the median of their times counts."""


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, work: Work, device: torch.device, steps: int) -> dict[str, Any]:
    """Milliseconds of a step back to back, and of its host; seconds of the first one; MiB at the peak."""
    run = make(name, work, device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    inner = getattr(run.model, "module", getattr(run.model, "_orig_mod", run.model))
    batches = [work.data(inner, device, index + 10 * rank) for index in range(2)]
    begin = time.perf_counter()
    loss = run.step(batches[0])
    _sync(device)
    found: dict[str, Any] = {"system": name, "first_s": round(time.perf_counter() - begin, 1)}
    for index in range(WARM_STEPS):
        run.step(batches[index % 2])
    _sync(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    blocks, hosts = list[float](), list[float]()
    for _ in range(BLOCKS):
        if dist.is_initialized():
            dist.barrier()
        _sync(device)
        begin = time.perf_counter()
        for index in range(steps):
            loss = run.step(batches[index % 2])
        hosts.append((time.perf_counter() - begin) / steps)
        _sync(device)
        blocks.append((time.perf_counter() - begin) / steps)
    found |= {"ms": round(1e3 * statistics.median(blocks), 2), "host_ms": round(1e3 * statistics.median(hosts), 2)}
    found["loss"] = round(loss.item(), 4)
    if device.type == "cuda":
        found["peak_mib"] = torch.cuda.max_memory_allocated(device) >> 20
        found["retries"] = torch.cuda.memory_stats(device)["num_alloc_retries"]
    return found


def table(systems: Sequence[str], work: Work, device: torch.device, until_s: float, steps: int) -> list[dict[str, Any]]:
    """A row for each system; one that failed, or that there was no time for, says so."""
    rows: list[dict[str, Any]] = []
    for name in systems:
        if _is_over(until_s, device):
            rows.append({"system": name, "left_out": "no time"})
            continue
        try:
            rows.append(measure(name, work, device, steps))
        except Exception as error:
            traceback.print_exc(limit=-6)
            rows.append({"system": name, "left_out": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"})
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _is_over(until_s: float, device: torch.device) -> bool:
    """True, on all ranks or none, if the time is over."""
    over = torch.tensor(float(time.time() > until_s), device=device)
    if dist.is_initialized():
        dist.all_reduce(over)
    return bool(over.item())


def main(asked: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """The table that is asked for, on this rank.

    Args:
        world_size: 0 without a process group.
    """
    device = torch.device(asked["device"], 0) if asked["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size:
        is_cuda = device.type == "cuda"
        dist.init_process_group("nccl" if is_cuda else "gloo", device_id=device if is_cuda else None)
    try:
        return table(asked["systems"], Work(**asked["work"]), device, asked["until"], asked["steps"])
    finally:
        if world_size:
            dist.destroy_process_group()


if __name__ == "__main__":
    import os

    rows = main(json.loads(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "0")))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(rows), flush=True)
