"""What each optimization is worth: a step without each alone, without all, and with all, in turns on real gloo ranks.

OMP_NUM_THREADS=1 python benchmarks/ablation.py
OMP_NUM_THREADS=1 python benchmarks/ablation.py --layers 12 --hidden 512 --vocab 8192 --heads 8 --only prefetch buckets

Over the loopback interface, each rank on a core of its own. That network is fast, so that most of what shows is work of
the host: copies, launches, allocations. What waiting costs shows on a slow one.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

import fxzero
from fxzero.models import ROBERTA_PRESETS, RobertaForMaskedLM
from fxzero.reference.ablation import OPTIMIZATIONS, Without
from fxzero.testing import run_ranks

CONFIGURATIONS: dict[str, Without] = {"full": (), **{name: (name,) for name in OPTIMIZATIONS}, "naive": "all"}
"""What `fxzero.compile` is to leave out, by a name for it."""
LARGE_BYTES = 64 * 1024
SENT = Path("/sys/class/net/lo/statistics/tx_bytes")


def measure(rank: int, world_size: int, names: Sequence[str], sizes: dict[str, int], rounds: int, k: int) -> Any:
    """Seconds, main-thread CPU seconds and sent bytes of each counted step, and what one more step does."""
    _pin(rank)
    fxzero.keep_freed_memory()
    config = replace(
        ROBERTA_PRESETS["small"],
        hidden_size=sizes["hidden"],
        ffn_size=4 * sizes["hidden"],
        num_heads=sizes["heads"],
        num_layers=sizes["layers"],
        vocab_size=sizes["vocab"],
        max_positions=sizes["seq"] + 2,
        dropout=0.0,
    )
    ids = torch.randint(5, config.vocab_size, (sizes["batch"], sizes["seq"]))
    batch = {"input_ids": ids, "labels": ids}
    steps: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        torch.manual_seed(0)
        model = RobertaForMaskedLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        zero = fxzero.compile(model, optimizer=optimizer, example=batch, without=CONFIGURATIONS[name])
        steps[name] = _step(zero, optimizer, batch)
        for _ in range(3):
            _run(steps[name])
        totals = zero.schedule.totals
        results[name] = {
            "seconds": [],
            "cpu": [],
            "sent": [],
            "collectives": totals.num_all_gathers + totals.num_reduce_scatters,
            "parameters": sum(param.numel() for param in zero.parameters()),
        }
    for _ in range(rounds):
        for name, step in steps.items():
            for index in range(k + 1):
                dist.barrier()
                sent, cpu, begin = int(SENT.read_text()), time.thread_time(), time.perf_counter()
                _run(step)
                seconds, cpu = time.perf_counter() - begin, time.thread_time() - cpu
                dist.barrier()
                if index:  # the first step of a turn finds the caches of others
                    results[name]["seconds"].append(seconds)
                    results[name]["cpu"].append(cpu)
                    results[name]["sent"].append((int(SENT.read_text()) - sent) / world_size)
    for name, step in steps.items():
        results[name] |= _count(step)
    return results


def _pin(rank: int) -> None:
    """Give this process, and the threads that gloo has started, one core."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {cores[rank % len(cores)]})


def _step(
    zero: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step in two parts: what fxzero does, and the optimizer."""

    def gradients() -> None:
        zero(**batch).loss.backward()
        zero.clip_grad_norm_(1.0)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return gradients, update


def _run(step: tuple[Callable[[], None], Callable[[], None]]) -> None:
    for part in step:
        part()


def _count(step: tuple[Callable[[], None], Callable[[], None]]) -> dict[str, int]:
    """Allocations of 64 KiB or more, and values read by the host, before the optimizer, but not by gloo's threads."""
    gradients, update = step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradients()
    update()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return {
        "allocations": sum(event.nbytes() >= LARGE_BYTES for event in events),
        "reads": sum(event.name() == "aten::_local_scalar_dense" for event in events),
    }


def print_table(ranks: Sequence[dict[str, dict[str, Any]]]) -> None:
    """A row for each configuration; a step lasts as long as its slowest rank."""
    rows: list[list[Any]] = []
    medians: dict[str, tuple[float, float]] = {}
    for name, result in ranks[0].items():
        seconds = [max(each) for each in zip(*(rank[name]["seconds"] for rank in ranks), strict=True)]
        medians[name] = statistics.median(seconds), statistics.median(result["cpu"])
        base = medians["full"]
        rows.append(
            [
                name if name in ("full", "naive") else f"without {name}",
                f"{medians[name][0] * 1e3:.1f}",
                f"{min(seconds) * 1e3:.1f}",
                f"{medians[name][0] / base[0]:.2f}",
                f"{medians[name][1] * 1e3:.1f}",
                f"{medians[name][1] / base[1]:.2f}",
                f"{statistics.median(result['sent']) / 2**20:.1f}",
                result["collectives"],
                result["allocations"],
                result["reads"],
            ]
        )
    headers = ("", "step ms", "min", "x full", "host ms", "x full", "MiB sent", "collectives", "allocations", "reads")
    print(tabulate(rows, headers=headers, colalign=("left",) + ("right",) * 9, disable_numparse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each configuration (%(default)s)")
    parser.add_argument("--k", type=int, default=3, help="steps of a turn that count (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZATIONS), help="of the single ones only these")
    for name, size in {"layers": 6, "hidden": 256, "heads": 4, "vocab": 4096, "seq": 64, "batch": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=size, help="(%(default)s)")
    arguments = parser.parse_args()
    names = ["full", *(arguments.only or OPTIMIZATIONS), "naive"]
    sizes = {name: getattr(arguments, name) for name in ("layers", "hidden", "heads", "vocab", "seq", "batch")}
    from ablation import measure as importable  # ranks import this file by its name

    ranks = run_ranks(arguments.world_size, importable, names, sizes, arguments.rounds, arguments.k, timeout=3600)
    print(f"python benchmarks/ablation.py {' '.join(sys.argv[1:])}".strip())
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {arguments.world_size} ranks, "
        f"{ranks[0]['full']['parameters'] * arguments.world_size / 1e6:.1f}M parameters, "
        f"{arguments.rounds} turns of {arguments.k} steps, clipped, fused AdamW"
    )
    print_table(ranks)
    print('"host": CPU of the main thread. Allocations: of 64 KiB or more, a step. Reads: values read by the host.')


if __name__ == "__main__":
    main()
