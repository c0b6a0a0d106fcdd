"""The command line of `fxzero calibrate`: what this machine computes and communicates with."""

from __future__ import annotations

import argparse
import json
from datetime import timedelta
from pathlib import Path

import torch
from tabulate import tabulate

from fxzero.calibrate import calibrate, measure_device, median_of_ranks
from fxzero.comm import make_comm
from fxzero.cost import GBIT, Cluster, Device, Link
from fxzero.train.launch import launch, under_torchrun
from fxzero.train.options import DEVICES
from fxzero.train.world import World, joined

HELP = "measure what a schedule is made from: the device of a rank, and its link to the others"
_DESCRIPTION = """\
Measures, as fxzero.compile does before the first plan, and prints a table and the same as Python.

  fxzero calibrate --nproc 2                                        two ranks on this machine
  torchrun --nnodes 2 --nproc-per-node 1 ... -m fxzero calibrate    the ranks of a job, over its network
"""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TIMEOUT = timedelta(minutes=5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--nproc", type=int, metavar="N", help="start this many ranks on this machine")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto is a GPU where there are enough")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the matrix products")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers to a JSON file")


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Measure and print; returns the exit status."""
    if (arguments.nproc or 1) > 1 and not under_torchrun():
        return launch(arguments.nproc, argv)
    with joined(arguments.device) as world:
        dtype = _DTYPES[arguments.dtype]
        if world.size == 1:
            device, link = measure_device(world.device, dtype), None
        else:
            own = calibrate(make_comm(None, world.device), world.device, dtype)
            cluster = median_of_ranks(own, None, "calibration", _TIMEOUT)
            device, link = cluster.device, cluster.link
        if world.is_main:
            print(_table(world, device, link), flush=True)
            if arguments.out is not None:
                numbers = Cluster(device, link).numbers() if link else [*vars(device).values()]
                arguments.out.write_text(json.dumps(numbers) + "\n")
    return 0


def _table(world: World, device: Device, link: Link | None) -> str:
    """What was measured, for people and for `cluster=`."""
    rows = [
        ("matrix products", f"{device.flops_per_s / 1e9:,.1f} GFLOP/s"),
        ("memory", f"{device.bytes_per_s / 1e9:,.1f} GB/s"),
        ("an operator", f"{1e6 * device.op_s:.1f} us"),
    ]
    if link is None:
        rows.append(("link", "a single rank has none: pass --nproc, or start ranks with torchrun"))
        return tabulate(rows, headers=(f"a rank alone on {world.device.type}", ""))
    rows += [
        ("link, each way at once", f"{link.bytes_per_s / GBIT:,.2f} Gbit/s"),
        ("latency of a gather", f"{1e6 * link.latency_s:,.0f} us"),
        ("compute lost to a byte", f"{1e9 * link.cpu_s_per_byte:.2f} ns"),
    ]
    table = tabulate(rows, headers=(f"a rank of {world.size} on {world.device.type} (median)", ""))
    return f"{table}\n\ncluster=fxzero.{Cluster(device, link)}".replace("=Device(", "=fxzero.Device(").replace(
        "=Link(", "=fxzero.Link("
    )
