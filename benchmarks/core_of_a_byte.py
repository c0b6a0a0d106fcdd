"""What does a byte take from a core that computes, and how much of that does a process see as its own time?

process   processor time of the rank, all threads, while it does nothing but send and receive
core      what a process of the lowest priority, which multiplies matrices on the same core, gets done less meanwhile

The kernel moves throttled packets in timer interrupts. In a rank that waits they interrupt nobody and count as nobody's
time; in one that computes they come out of its compute. So the second number is what a step has to pay, and the first
is the lower bound that `benchmarks.network` counts with. Two ranks in network namespaces under `tc tbf`, as there.

sudo -E env PATH="$PATH" python -m benchmarks.core_of_a_byte
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn

from benchmarks.about import heading
from benchmarks.network.baselines import wire
from benchmarks.network.systems import Job, Shape
from benchmarks.network.testbed import CannotRunHere, Network

PREFIX = "fxzero-core-"
ALONE_S = 2.0
"""How long the matrices are multiplied alone, before and after each exchange."""


def multiply(count: Any, ends: Any) -> None:
    """Count matrix products, in what time others leave."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    left, right = torch.randn(512, 512), torch.randn(512, 2048)
    product = torch.empty(512, 2048)
    with torch.no_grad():
        while not ends.value:
            torch.mm(left, right, out=product)
            count.value += 1


def run_rank(options: argparse.Namespace) -> None:
    """Measure in one rank; the first prints a JSON line for each round."""
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    context = mp.get_context("fork")  # before gloo has threads
    count, ends = context.Value("q", 0, lock=False), context.Value("b", 0, lock=False)
    other = context.Process(target=multiply, args=(count, ends), daemon=True)
    other.start()
    dist.init_process_group("gloo")
    traffic = wire(nn.Module(), Job(rank, 2, Shape()))
    nbytes, nothing = traffic.facts()["sent_bytes"] * options.exchanges, torch.zeros(())

    def exchange() -> None:
        for _ in range(options.exchanges):
            traffic.forward(nothing, nothing)

    def alone() -> None:
        time.sleep(ALONE_S)

    def products_of(call: Callable[[], None]) -> tuple[int, float, float]:
        """Products, seconds and own processor seconds meanwhile."""
        dist.barrier()
        before, cpu, begin = count.value, time.process_time(), time.perf_counter()
        call()
        return count.value - before, time.perf_counter() - begin, time.process_time() - cpu

    traffic.forward(nothing, nothing)  # TCP finds its pace
    for _ in range(options.rounds):
        (first, first_s, _), (under, seconds, cpu_s), (last, last_s, _) = map(products_of, (alone, exchange, alone))
        lost_s = seconds - under * (first_s + last_s) / (first + last)
        per_byte = [1e9 * cpu_s / nbytes, 1e9 * lost_s / nbytes]
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, per_byte)
        if rank == 0:
            print(json.dumps({"gbit": 8e-9 * nbytes / seconds, "ns": gathered}), flush=True)
    ends.value = 1
    other.join()
    dist.barrier()
    dist.destroy_process_group()


def measure(gbit_per_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one rate: medians over rounds and ranks."""
    with Network(prefix=PREFIX) as network:
        network.set_rate(gbit_per_s)
        command = [sys.executable, "-m", "benchmarks.core_of_a_byte", "--as-rank"]
        command += ["--rounds", str(options.rounds), "--exchanges", str(options.exchanges)]
        found = network.run_ranks(command, timeout=options.timeout)
    samples = [pair for each in found for pair in each["ns"]]
    process, core = (statistics.median(values) for values in zip(*samples, strict=True))
    return {
        "Gbit/s": gbit_per_s,
        "link, Gbit/s": statistics.median(each["gbit"] for each in found),
        "process, ns per byte": process,
        "core, ns per byte": core,
        "core / process": core / process,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[8.0, 4.0, 2.0, 1.0, 0.5], help="in Gbit/s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--exchanges", type=int, default=3, help="of 94 MB each way, in a round")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one rate")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        run_rank(options)
        return
    try:
        rows = [measure(rate, options) for rate in options.rates]
    except CannotRunHere as error:
        raise SystemExit(str(error)) from None
    print(heading("python -m benchmarks.core_of_a_byte"))
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=("g", ".2f", ".2f", ".2f", ".2f")))


if __name__ == "__main__":
    main()
