"""The command line of `fxzero calibrate`: what this machine computes and communicates with."""

import argparse
import json
from datetime import timedelta
from pathlib import Path

import torch
from tabulate import tabulate
from torch.distributed.device_mesh import init_device_mesh

from fxzero.comm.groups import Group, group_of_mesh
from fxzero.comm.make import make_comm
from fxzero.commands.errors import CommandError, report
from fxzero.commands.world import DEVICES, World, run_on_ranks
from fxzero.cost.calibrate import calibrate, measure_device, median_of_ranks
from fxzero.cost.model import GBIT, Cluster, Device, Link

HELP = "measure what a schedule is made from: the device of a rank, and its link to the others"
_DESCRIPTION = """\
Measures, as fxzero.compile does before the first plan, and prints a table and the same as Python.

  fxzero calibrate --nproc 2                                        two ranks on this machine
  torchrun --nnodes 2 --nproc-per-node 1 ... -m fxzero calibrate    the ranks of a job, over its network
  torchrun --nnodes 2 --nproc-per-node 4 ... -m fxzero calibrate    across its nodes, and inside them, as on a 2-D mesh
"""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TIMEOUT = timedelta(minutes=5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--nproc", type=int, metavar="N", help="start this many ranks on this machine")
    parser.add_argument("--nodes", type=int, metavar="N", help="take the ranks for so many nodes (default: torchrun's)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto is a GPU where there are enough")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the matrix products")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers to a JSON file")


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Measure and print; returns the exit status."""
    return run_on_ranks("calibrate", arguments, argv, _run)


def _run(arguments: argparse.Namespace, world: World) -> int:
    try:
        group = _group(world, arguments.nodes)
    except CommandError as error:
        return report("calibrate", error)  # before the ranks part: the first one to end ends the others
    dtype = _DTYPES[arguments.dtype]
    if world.size == 1:
        device = measure_device(world.device, dtype)
        numbers, table = [*vars(device).values()], _table_of_one(world, device)
    else:
        own = calibrate(make_comm(group, world.device), world.device, dtype)
        cluster = median_of_ranks(own, group, "calibration", _TIMEOUT)
        numbers, table = cluster.numbers(), _table(world, cluster)
    if world.is_main:
        print(table, flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(numbers) + "\n")
    return 0


def _group(world: World, num_nodes: int | None) -> Group | None:
    """All ranks, or those of a mesh of nodes if there are several of several ranks."""
    nodes = num_nodes or world.size // world.local_size
    if nodes < 1 or world.size % nodes:
        raise CommandError(f"--nodes {nodes} does not divide {world.size} ranks.")
    if nodes in (1, world.size):
        return None
    shape = nodes, world.size // nodes
    return group_of_mesh(init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard")))


def _table_of_one(world: World, device: Device) -> str:
    rows = [*_device_rows(device), ("link", "a single rank has none: pass --nproc, or start ranks with torchrun")]
    return tabulate(rows, headers=(f"a rank alone on {world.device.type}", ""))


def _table(world: World, cluster: Cluster) -> str:
    """What was measured, for people and for `cluster=`."""
    rows = _device_rows(cluster.device)
    rows += _link_rows("link", cluster.link)
    rows += _link_rows("inside a node", cluster.inside) if cluster.inside is not None else []
    table = tabulate(rows, headers=(f"a rank of {world.size} on {world.device.type} (median)", ""))
    parts = [cluster.device, cluster.link, *([] if cluster.inside is None else [cluster.inside])]
    return f"{table}\n\ncluster=fxzero.Cluster({', '.join(f'fxzero.{part}' for part in parts)})"


def _device_rows(device: Device) -> list[tuple[str, str]]:
    return [
        ("matrix products", f"{device.flops_per_s / 1e9:,.1f} GFLOP/s"),
        ("memory", f"{device.bytes_per_s / 1e9:,.1f} GB/s"),
        ("an operator", f"{1e6 * device.op_s:.1f} us"),
    ]


def _link_rows(name: str, link: Link) -> list[tuple[str, str]]:
    return [
        (f"{name}, each way at once", f"{link.bytes_per_s / GBIT:,.2f} Gbit/s"),
        ("latency of a gather", f"{1e6 * link.latency_s:,.0f} us"),
        ("compute lost to a byte", f"{1e9 * link.cpu_s_per_byte:.2f} ns"),
    ]
