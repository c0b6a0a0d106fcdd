"""Direct messages or a ring, over gloo, for three ranks or more whose links are slow in both directions.

direct   each rank sends its slice to every other one, all at once; sums in rank order, when all terms are there
ring     W-1 steps, each passing a slice on to the next rank, in a reduction with an addition in between

Both send and receive (W-1)/W of a bucket. Ranks are processes in network namespaces that a bridge joins; `tc tbf`
limits what each sends, and what each receives, as the port of a switch does. The two take turns. Nothing computes
meanwhile, which is the best case of a ring: its steps need the host, direct messages do not.

sudo -E env PATH="$PATH" python -m benchmarks.ring_or_direct
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor

from benchmarks.about import heading
from benchmarks.network.testbed import CannotRunHere, Network
from fxzero.comm.make import make_comm
from fxzero.graph.layout import Bucket, ParamSpec

MIB = 2**20
PREFIX = "fxzero-ring-"
WARM_ROUNDS = 2
_TAG = 77_000


def _run(*calls: Callable[[], object] | None) -> None:
    for call in calls:
        if call is not None:
            call()


class _Buffers:
    """What both ways gather and reduce."""

    def __init__(self, nbytes: int, rank: int, world_size: int) -> None:
        self.payload = Bucket((ParamSpec("measured", (nbytes // 4,), torch.float32, True),), world_size).gradients
        shard_numel, numel = self.payload.slice_numel, self.payload.numel
        generator = torch.Generator().manual_seed(rank)
        self.shard = torch.randn(shard_numel, generator=generator)
        self.grads = torch.randn(numel, generator=generator)
        self.full, self.reduced = torch.zeros(numel), torch.zeros(shard_numel)
        self.scratch = torch.zeros(world_size * shard_numel)


def direct(buffers: _Buffers) -> tuple[Callable[[], object], Callable[[], object]]:
    """A gather and a reduce-scatter as fxzero makes them."""
    comm = make_comm(None, torch.device("cpu"))
    gather = comm.bind_gather(buffers.payload, buffers.shard, buffers.full)
    reduce = comm.bind_reduce(buffers.payload, buffers.grads, buffers.scratch, buffers.reduced, accumulate=False)
    return lambda: _run(*gather, comm.drain), lambda: _run(*reduce, comm.drain)


def ring(buffers: _Buffers) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same around a ring; every receive is posted before the first send."""
    group, rank, world_size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    left, right, steps = (rank - 1) % world_size, (rank + 1) % world_size, range(world_size - 1)
    gathered, terms = (each.split(buffers.payload.slice_numel) for each in (buffers.full, buffers.grads))
    sums = [*buffers.scratch.split(buffers.payload.slice_numel)[: world_size - 2], buffers.reduced]

    def pass_on(messages: Sequence[Tensor], into: Sequence[Tensor], then: Callable[[int], object]) -> None:
        receives = [group.recv([into[step]], left, _TAG + step) for step in steps]
        sends: list[dist.Work] = []
        for step in steps:
            sends.append(group.send([messages[step]], right, _TAG + step))
            receives[step].wait()
            then(step)
        for send in sends:
            send.wait()

    def gather() -> None:
        gathered[rank].copy_(buffers.shard)
        messages = [gathered[(rank - step) % world_size] for step in steps]
        pass_on(messages, [gathered[(rank - 1 - step) % world_size] for step in steps], lambda step: None)

    def reduce() -> None:
        messages = [terms[(rank - 1) % world_size], *sums[:-1]]
        pass_on(messages, sums, lambda step: sums[step].add_(terms[(rank - 2 - step) % world_size]))
        buffers.reduced.div_(world_size)

    return gather, reduce


WAYS = {"direct": direct, "ring": ring}


def _timed(call: Callable[[], object]) -> list[float]:
    """Seconds until the last rank is done, and the processor seconds of all ranks together."""
    dist.barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    call()
    seconds, cpu_s = torch.tensor(time.perf_counter() - begin), torch.tensor(time.process_time() - cpu)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(cpu_s)
    return [float(seconds), float(cpu_s)]


def run_rank(options: argparse.Namespace) -> None:
    """Measure in one rank; the first prints a JSON line for each size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for mib in options.mib:
        buffers = _Buffers(mib * MIB, rank, world_size)
        ways = {name: make(buffers) for name, make in WAYS.items()}
        samples: dict[str, list[list[float]]] = {f"{kind} {name}": [] for kind in ("gather", "reduce") for name in ways}
        results: dict[str, Tensor] = {}
        for index in range(WARM_ROUNDS + options.rounds):
            for place, kind in enumerate(("gather", "reduce")):
                for name in list(ways)[:: 1 if index % 2 else -1]:
                    took = _timed(ways[name][place])
                    if index >= WARM_ROUNDS:
                        samples[f"{kind} {name}"].append(took)
                    results[f"{kind} {name}"] = (buffers.full, buffers.reduced)[place].clone()
        if not torch.equal(results["gather direct"], results["gather ring"]):
            raise AssertionError("the two gather different parameters")
        torch.testing.assert_close(results["reduce direct"], results["reduce ring"])
        other = (results["reduce direct"] != results["reduce ring"]).float().mean()
        dist.all_reduce(other)
        if rank == 0:
            sent = buffers.payload.slice_nbytes * (world_size - 1)
            print(json.dumps({"mib": mib, "sent": sent, "other": float(other) / world_size, **samples}), flush=True)
    dist.destroy_process_group()


def measure(world_size: int, gbit_per_s: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one rate."""
    with Network(world_size, prefix=PREFIX, shares_cores=True) as network:
        network.set_rate(gbit_per_s)
        network.set_rate_of_ports(gbit_per_s)
        command = [sys.executable, "-m", "benchmarks.ring_or_direct", "--as-rank", "--rounds", str(options.rounds)]
        command += ["--mib", *map(str, options.mib)]
        found = network.run_ranks(command, timeout=options.timeout)
    return [row for each in found for row in _rows(world_size, gbit_per_s, each)]


def _rows(world_size: int, gbit_per_s: float, found: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind in ("gather", "reduce"):
        medians = {name: [statistics.median(s) for s in zip(*found[f"{kind} {name}"], strict=True)] for name in WAYS}
        (direct_s, direct_cpu_s), (ring_s, ring_cpu_s) = medians["direct"], medians["ring"]
        rows.append(
            {
                "ranks": world_size,
                "Gbit/s": gbit_per_s,
                "MiB": found["mib"],
                "what": kind,
                "wire, ms": 1e3 * found["sent"] / (gbit_per_s * 1e9 / 8),
                "direct, ms": 1e3 * direct_s,
                "ring, ms": 1e3 * ring_s,
                "ring / direct, %": 100 * ring_s / direct_s,
                "direct, CPU ms": 1e3 * direct_cpu_s / world_size,
                "ring, CPU ms": 1e3 * ring_cpu_s / world_size,
                "other sums": "" if kind == "gather" else f"{found['other']:.0%}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.5], help="of each rank, in Gbit/s")
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 4, 16], help="sizes of the bucket")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one rate")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        run_rank(options)
        return
    if min(options.world_sizes) < 3:
        parser.error("--world-sizes: two ranks have but one way; it must be at least 3")
    rows: list[dict[str, Any]] = []
    try:
        for world_size in options.world_sizes:
            for rate in options.rates:
                rows += measure(world_size, rate, options)
    except CannotRunHere as error:
        raise SystemExit(str(error)) from None
    print(heading("python -m benchmarks.ring_or_direct"))
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
