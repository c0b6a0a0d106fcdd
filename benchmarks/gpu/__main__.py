"""Print how long steps on one GPU take, and their peaks of memory, against PyTorch's own ways; in at most six minutes.

    python -m benchmarks.gpu --json gpu.json --markdown gpu.md
    python -m benchmarks.gpu --device cpu --toy --seconds 60 --systems eager:bf16 fxzero:bf16     # to try the program

Two ranks share the GPU: each says that it is on another host, so that NCCL joins them by sockets on the loopback, a
slow network. Start CUDA's multi-process service before (`nvidia-cuda-mps-control -d`), or they take turns on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.about import ROOT, about, one_line
from benchmarks.gpu.report import markdown
from benchmarks.gpu.systems import Work


@dataclass(frozen=True)
class Table:
    """Systems that are measured on the same work by the same ranks."""

    name: str
    title: str
    work: Work
    systems: tuple[str, ...]
    world_size: int = 0
    """Ranks of a process group; 0: there is none."""


TABLES = (
    Table(
        "small",
        "GPT-2 medium, 1 x 256, one rank",
        Work("gpt", 1, 256),
        ("eager:bf16", "fxzero:bf16", "fxzero_graph:bf16", "fxzero_fused_graph:bf16", "compile_ro:bf16"),
    ),
    Table(
        "alone",
        "GPT-2 medium, 8 x 1024, one rank",
        Work("gpt", 8, 1024),
        (
            *("eager:bf16", "fxzero:bf16", "fxzero_fused:bf16", "fxzero_fused_graph:bf16", "compile:bf16"),
            *("eager:auto", "fxzero:mp", "fxzero_fused:mp", "compile:auto"),
        ),
    ),
    Table(
        "ranks",
        "GPT-2 medium, 8 x 1024 on each of two ranks, NCCL over sockets",
        Work("gpt", 8, 1024),
        (
            *("fsdp2:mp", "fsdp2compile:mp", "fxzero:mp", "fxzero_fused:mp", "fxzero_fused_graph:mp", "ddp:auto"),
            *("fsdp2:bf16", "fxzero:bf16", "fxzero_stage2:mp"),
        ),
        2,
    ),
    Table("group", "GPT-2 medium, 8 x 1024, a group of one", Work("gpt", 8, 1024), ("ddp:auto", "fsdp2:mp"), 1),
    Table(
        "llama",
        "Llama, 1.06 billion parameters, 2 x 1024, one rank",
        Work("llama", 2, 1024),
        ("eager:bf16", "fxzero:bf16", "fxzero_fused:bf16", "compile:bf16"),
    ),
)


def run(table: Table, device: str, until_s: float, steps: int) -> list[dict[str, Any]]:
    """The rows of a table, from processes of its own."""
    asked = {"work": asdict(table.work), "systems": table.systems, "device": device, "until": until_s, "steps": steps}
    command = [sys.executable, "-m", "benchmarks.gpu.measure", json.dumps(asked)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes: list[subprocess.Popen[str]] = []
    for rank in range(max(table.world_size, 1)):
        environment = dict(os.environ)
        if table.world_size:
            environment |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(table.world_size)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"NCCL_HOSTID": f"node{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        printed = [process.communicate(timeout=max(until_s - time.time(), 0) + 60)[0] for process in processes]
        lines = printed[0].strip().splitlines()
        return json.loads(lines[-1])
    except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
        return [{"system": name, "left_out": f"no result ({type(error).__name__})"} for name in table.systems]
    finally:
        for process in processes:
            process.kill()


def chosen(arguments: argparse.Namespace) -> list[Table]:
    """The tables that are asked for, of the size that is asked for."""
    tables = [table for table in TABLES if table.name in arguments.tables]
    if arguments.systems:
        tables = [replace(table, systems=tuple(arguments.systems)) for table in tables]
    if arguments.toy:
        work = {each.name: Work(each.work.model, 2, 16, is_toy=True) for each in tables}
        tables = [replace(each, title=f"A toy in place of: {each.title}", work=work[each.name]) for each in tables]
    return tables


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="models that are next to nothing")
    parser.add_argument("--tables", nargs="+", choices=[each.name for each in TABLES], default=[t.name for t in TABLES])
    parser.add_argument("--systems", nargs="+", help="in place of those of each table")
    parser.add_argument("--seconds", type=float, default=360, help="for all; what there is no time for is left out")
    parser.add_argument("--steps", type=int, default=8, help="back to back, three times")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here. `--device cpu --toy` tries the program without one.", file=sys.stderr)
        return 2
    begin, described = time.time(), about("python -m benchmarks.gpu")
    if arguments.device == "cuda":
        described["device"] = torch.cuda.get_device_name(0)
    tables = chosen(arguments)
    weights = [len(table.systems) for table in tables]
    found: dict[str, list[dict[str, Any]]] = {}
    texts = [f"{one_line(described)} {described.get('device', 'CPU')}.\n\n    {described['command']}\n"]
    print(texts[0], flush=True)
    for index, table in enumerate(tables):
        share = sum(weights[: index + 1]) / sum(weights)
        found[table.name] = run(table, arguments.device, begin + share * (arguments.seconds - 20), arguments.steps)
        texts.append(markdown(table.title, found[table.name]))
        print(texts[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(described | {"tables": found}, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
