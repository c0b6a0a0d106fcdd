"""Measure, in a fraction of a second, what a rank computes and communicates with: a `Cluster` for this machine.

Every rank measures at the same time, as in a step, and all take the median of each number.
"""

import json
import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch

from fxzero.comm import agree
from fxzero.comm.base import Bound, Comm, in_turn
from fxzero.comm.groups import Group
from fxzero.comm.nodes_replicate import HierarchicalComm
from fxzero.cost.model import Cluster, Device, Link, rounded
from fxzero.graph.layout import Payload

SMALL_BYTES, LARGE_BYTES = 2**14, 2**22
"""Of the messages that latency and bandwidth are measured with, per rank that receives."""
IN_FLIGHT = 3
"""Large messages at a time: what a schedule keeps the link busy with."""
BATCH_S, NUM_BATCHES = 0.005, 9
"""Seconds of calls between two looks at the clock, at least, and how often."""
LINK_S = 0.3
"""After so long no further message is sent."""


def calibrate(comm: Comm, device: torch.device, dtype: torch.dtype = torch.float32) -> Cluster:
    """Measure this rank's device and link; a collective over the ranks of `comm`.

    On a mesh of several nodes the link is that to other nodes, which all ranks of a node use at the same time; the one
    inside a node is measured after it.

    Args:
        dtype: of the matrix products.

    Raises:
        CommunicationError: a peer has gone.
    """
    measured = measure_device(device, dtype)
    if not isinstance(comm, HierarchicalComm):
        return Cluster(measured, measure_link(comm, device))
    across = measure_link(comm.across, device)
    return Cluster(measured, across, measure_link(comm.inside, device) if comm.inside.shard_ranks > 1 else None)


def calibrate_once(
    comm: Comm, group: Group | None, device: torch.device, dtype: torch.dtype, topic: str, timeout: timedelta
) -> Cluster:
    """What the first model of a process group measured, for it and for each later one; a collective.

    So models that are equal get equal layouts, however noisy the machine is.

    Args:
        dtype: of the matrix products.
    """
    name = f"costs of {device.type} in {dtype}"
    known = agree.recall(group, name)
    if known is None:
        measured = median_of_ranks(calibrate(comm, device, dtype), group, topic, timeout)
        agree.remember(group, name, json.dumps(measured.numbers()))
        return measured
    return Cluster.of_numbers(json.loads(known))


def median_of_ranks(own: Cluster, group: Group | None, topic: str, timeout: timedelta) -> Cluster:
    """The median over ranks of each number, to two digits, the same on all of them."""
    lines = agree.exchange(group, topic, [json.dumps(own.numbers())], timeout=timeout)
    numbers = zip(*(json.loads(line) for (line,) in lines), strict=True)
    return Cluster.of_numbers([rounded(statistics.median(values)) for values in numbers])


def measure_device(device: torch.device, dtype: torch.dtype = torch.float32) -> Device:
    """Rates of a matrix product [512, 512] x [512, 2048], of a sum of 32 MiB into 32 MiB, and of a tiny operator."""
    generator = torch.Generator(device).manual_seed(0)  # the user's goes on as if nothing had been measured
    left = torch.randn(512, 512, device=device, generator=generator).to(dtype)
    right = torch.randn(512, 2048, device=device, generator=generator).to(dtype)
    into, addend = torch.zeros(2**23, device=device), torch.ones(2**23, device=device)
    tiny = torch.zeros(1, device=device)
    product = torch.empty(512, 2048, device=device, dtype=dtype)
    with torch.no_grad():
        product_s = _seconds_of(lambda: torch.mm(left, right, out=product), device)
        sum_s = _seconds_of(lambda: into.add_(addend), device)
        tiny_s = _seconds_of(lambda: tiny.add_(1.0), device)
    return Device(2 * 512 * 512 * 2048 / product_s, 3 * into.nbytes / sum_s, tiny_s)


def _seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The median seconds of a call over batches of `BATCH_S` or more, after shorter ones that find how many calls."""
    times, seconds = 1, _batch_s(run, device, 1)
    while seconds < BATCH_S:
        times *= 2
        seconds = _batch_s(run, device, times)
    return statistics.median(_batch_s(run, device, times) for _ in range(NUM_BATCHES)) / times


def _batch_s(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of so many calls."""
    _finish(device)
    begin = time.perf_counter()
    for _ in range(times):
        run()
    _finish(device)
    return time.perf_counter() - begin


def measure_link(comm: Comm, device: torch.device) -> Link:
    """Latency and bandwidth of gathers, each way at once, and what they take from this process's cores."""
    small, large = _gathers(comm, device, SMALL_BYTES, 1), _gathers(comm, device, LARGE_BYTES, IN_FLIGHT)
    small()
    large()  # TCP finds its pace
    latency_s = min(_batch_s(small, device, 1) for _ in range(5))
    begin, cpu, turns = time.perf_counter(), time.process_time(), 0
    more = torch.ones((), device=device)
    while more.item():
        large()
        turns += 1
        more.fill_(float(turns < 12 and time.perf_counter() - begin < LINK_S))
        comm.all_reduce(more, "max")
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    nbytes = turns * IN_FLIGHT * LARGE_BYTES * (comm.shard_ranks - 1)
    on_cores = cpu_s / nbytes if device.type == "cpu" else 0.0
    return Link(nbytes / seconds, latency_s, on_cores)


def _gathers(comm: Comm, device: torch.device, nbytes: int, number: int) -> Callable[[], object]:
    """A function that makes gathers of one size at the same time, between buffers of their own."""
    bound: list[Bound] = []
    for index in range(number):
        slice_numel = nbytes // torch.float32.itemsize
        payload = Payload((f"calibration {nbytes} {index}",), comm.shard_ranks, slice_numel, torch.float32)
        shard, full = (torch.zeros(n, device=device) for n in (payload.slice_numel, payload.numel))
        bound.append(comm.bind_gather(payload, shard, full))
    return in_turn(*(each.start for each in bound), *(each.wait for each in bound), comm.drain)


def _finish(device: torch.device) -> None:
    """Wait for what runs on an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
