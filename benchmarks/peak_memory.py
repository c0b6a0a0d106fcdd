"""Peak resident memory of a rank during steps, against FSDP2: 12 layers, 46.6M parameters, batch 4 x 128, 2 ranks.

OMP_NUM_THREADS=1 python -m benchmarks.peak_memory

Each system has processes of its own. What counts is steps alone: the kernel's mark of the peak is reset after the
warm-up. "Before" is a rank with everything imported, the process group up and the model on the meta device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import fxzero
from benchmarks.network.model import Encoder, init_weights, make_batch
from benchmarks.network.systems import Shape, adamw, mixed_precision
from benchmarks.resident import reset_peak, resident_mib
from fxzero.passes import default_passes
from fxzero.testing import engine_of

SHAPE = Shape()
MIB = 2**20
WORDS = {
    "fsdp2": "FSDP2, default",
    "fsdp2_async": "FSDP2, leanest",
    "regather": "fxzero, gathers again",
    "keep": "fxzero, keeps",
}


@dataclass
class System:
    """A model made ready to train, its optimizer, and the parts that it can name, in bytes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parts: Callable[[], dict[str, int]]


def build_fsdp2(model: Encoder, *, lean: bool, mixed: bool) -> System:
    """fully_shard per block; `lean` prefetches one block, by asynchronous gathers, which held the least memory."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=mixed_precision(mixed=mixed))
    whole: Any = model
    if lean:
        blocks: list[Any] = list(model.blocks)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module._set_unshard_async_op(True)  # pyright: ignore[reportPrivateUsage]
        for module, after in zip([whole, *blocks], blocks, strict=False):
            module.set_modules_to_forward_prefetch([after])
        for module, before in zip([whole, *blocks[::-1]], blocks[::-1], strict=False):
            module.set_modules_to_backward_prefetch([before])
    model.to_empty(device="cpu")
    model.apply(init_weights)
    optimizer = adamw(model.parameters())
    return System(model, optimizer, lambda: {"parameters": sum(p.to_local().nbytes for p in whole.parameters())})


def build_fxzero(model: Encoder, *, keep: bool, mixed: bool, **options: int) -> System:
    optimizer = adamw(model.parameters())
    passes = default_passes(max_kept_bytes=None if keep else 0, **options)
    example = make_batch(SHAPE, 0, dist.get_rank())
    policy = mixed_precision(mixed=True) if mixed else None
    zero = fxzero.compile(
        model, optimizer=optimizer, example=example, init_fn=init_weights, passes=passes, mp_policy=policy
    )
    engine = engine_of(zero)

    def parts() -> dict[str, int]:
        assert engine.sharded.shards is not None
        return {
            "parameters": engine.sharded.shards.params.nbytes,
            "gradients": engine.sharded.shards.grads.nbytes,
            "arena": engine.sharded.arena.nbytes,
        }

    return System(zero, optimizer, parts)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's tensors of this rank."""
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(getattr(value, "_local_tensor", value).nbytes for value in held)


def run_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """One rank of one system: what it measured."""
    if arguments.malloc == "kept" and not fxzero.keep_freed_memory():
        raise SystemExit("This C library has no such setting: use --malloc default.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = TCPStore("localhost", arguments.port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=arguments.rank, world_size=2)
    with torch.device("meta"):
        model = Encoder(SHAPE)
    dist.barrier()
    (before,) = resident_mib("VmRSS")
    if arguments.system.startswith("fsdp2"):
        system = build_fsdp2(model, lean=arguments.system == "fsdp2_async", mixed=arguments.mixed)
    else:
        options = {} if arguments.bucket_mib is None else {"bucket_bytes": int(arguments.bucket_mib * MIB)}
        options |= {} if arguments.prefetch_mib is None else {"prefetch_bytes": int(arguments.prefetch_mib * MIB)}
        system = build_fxzero(model, keep=arguments.system == "keep", mixed=arguments.mixed, **options)
    (built,) = resident_mib("VmRSS")
    loss = float("nan")
    for step in range(arguments.warmup + arguments.steps):
        if step == arguments.warmup:
            dist.barrier()
            reset_peak()
        loss = train_step(system, *make_batch(SHAPE, step, arguments.rank))
    peak, after, anonymous = resident_mib("VmHWM", "VmRSS", "RssAnon")
    parts = {**system.parts(), "optimizer state": optimizer_bytes(system.optimizer)}
    return {
        "before": before,
        "built": built,
        "peak": peak,
        "after": after,
        "anonymous": anonymous,
        "loss": loss,
        "parts": {name: nbytes / MIB for name, nbytes in parts.items()},
    }


def train_step(system: System, ids: Tensor, labels: Tensor) -> float:
    """As any training loop has it."""
    loss = system.model(ids, labels)
    loss.backward()
    system.optimizer.step()
    system.optimizer.zero_grad()
    return loss.item()


def measure(system: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Both ranks of a system, each in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    store = TCPStore("localhost", port, 2, is_master=True, wait_for_workers=False)
    command = [
        sys.executable,
        "-m",
        "benchmarks.peak_memory",
        *arguments,
        "--system",
        system,
        "--port",
        str(store.port),
    ]
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for rank in range(2)
    ]
    answers = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{system} failed")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(WORDS), choices=list(WORDS))
    parser.add_argument("--malloc", choices=("default", "kept"), default="default", help="kept: keep_freed_memory()")
    parser.add_argument("--mixed", action="store_true", help="parameters in bf16, sums of gradients in fp32")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--bucket-mib", type=float, help="fxzero's bucket_bytes")
    parser.add_argument("--prefetch-mib", type=float, help="fxzero's prefetch_bytes")
    parser.add_argument("--system", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.system is not None:
        print(json.dumps(run_rank(arguments)), flush=True)
        os._exit(0)  # gloo's teardown can wait for a peer that left first
    report({system: measure(system, sys.argv[1:]) for system in arguments.systems}, arguments.malloc)


def report(results: dict[str, list[dict[str, Any]]], malloc: str) -> None:
    """Print the peaks side by side, and what fxzero's consist of."""
    lean = max(rank["peak"] for rank in results["fsdp2_async"]) if "fsdp2_async" in results else float("nan")
    rows: list[list[Any]] = []
    parts: list[dict[str, Any]] = []
    for system, ranks in results.items():
        largest = max(ranks, key=lambda rank: rank["peak"])
        added = largest["peak"] - largest["before"]
        peaks = " / ".join(f"{rank['peak']:.0f}" for rank in ranks)
        rows.append([WORDS[system], largest["before"], peaks, added, f"{largest['peak'] / lean:.2f}"])
        if not system.startswith("fsdp2"):
            rest = added - sum(largest["parts"].values())
            parts.append({"": WORDS[system], "added": added, **largest["parts"], "rest": rest})
    with torch.device("meta"):
        count = sum(p.numel() for p in Encoder(SHAPE).parameters())
    machine = platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {machine}, malloc {malloc}; {count / 1e6:.1f}M parameters, 2 ranks")
    print("\nMiB per rank, peak of each rank; ratio of the larger peak to FSDP2's leanest:\n")
    heads = ["system", "before", "peak of the ranks", "added", "ratio"]
    print(tabulate(rows, headers=heads, floatfmt=".0f", tablefmt="github", disable_numparse=[4]))
    print("\nWhat fxzero adds; the rest is activations, traces, code that is read in, and gaps in the heap:\n")
    print(tabulate(parts, headers="keys", floatfmt=".0f", tablefmt="github"))


if __name__ == "__main__":
    main()
