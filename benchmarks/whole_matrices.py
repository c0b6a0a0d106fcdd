"""A step of Muon on the matrices of a transformer's blocks: processor time of a rank and bytes it sends, against FSDP2.

    OMP_NUM_THREADS=1 python -m benchmarks.whole_matrices --world-size 2

Measured is `optimizer.step()`, whose gradients are there. FSDP2 runs the same optimizer on DTensors. "alone" is one
rank that steps the whole model: the work that ranks can share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxzero
from benchmarks.about import heading
from benchmarks.network.model import Encoder, make_batch
from benchmarks.network.systems import Shape
from fxzero.testing import engine_of, run_ranks

MIB = 2**20
_SENT: Mapping[str, Callable[[int, int], float]] = {
    "all_gather_tensor": lambda nbytes, ranks: nbytes * (ranks - 1),
    "reduce_scatter_tensor": lambda nbytes, ranks: nbytes * (ranks - 1) / ranks,
    "all_reduce": lambda nbytes, ranks: 2 * nbytes * (ranks - 1) / ranks,
}
"""Bytes that a rank sends at least in a functional collective, from those that it puts in."""


class _Collectives:
    """Counts the functional collectives of DTensors inside of the block, and the bytes that this rank sends in them."""

    def __init__(self) -> None:
        self.num, self.nbytes = 0, 0.0
        self._own: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> _Collectives:
        for name in _SENT:
            self._own[name] = getattr(functional, name)
            setattr(functional, name, partial(self._call, name))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, function in self._own.items():
            setattr(functional, name, function)

    def _call(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.num += 1
        self.nbytes += _SENT[name](tensor.nbytes, dist.get_world_size())
        return self._own[name](tensor, *args, **kwargs)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [param for name, param in model.named_parameters() if name.startswith("blocks") and param.ndim == 2]


def _muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon(_matrices(model), lr=0.02)


def _seconds(optimizer: torch.optim.Optimizer, rounds: int) -> float:
    """The least processor time of a step, of all threads of the process."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        optimizer.step()
        best = min(best, time.process_time() - begin)
    return best


def alone(rank: int, world_size: int, shape: Shape, rounds: int) -> tuple[float, float, int]:
    """One rank with the whole model."""
    torch.manual_seed(0)
    model = Encoder(shape)
    model(*make_batch(shape, 0, rank)).backward()
    optimizer = _muon(model)
    optimizer.step()
    return _seconds(optimizer, rounds), 0.0, 0


def ours(rank: int, world_size: int, shape: Shape, rounds: int) -> tuple[float, float, int]:
    """Processor time, bytes sent, and exchanges of a step of fxzero."""
    torch.manual_seed(0)
    zero = fxzero.compile(Encoder(shape))
    zero(*make_batch(shape, 0, rank)).backward()
    optimizer, comm = _muon(zero), engine_of(zero).sharded.comm
    exchange, sent = comm.all_to_all, list[int]()

    def counting(what: str, out: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        sent.append(sum(each.nbytes for peer, each in enumerate(out) if peer != comm.rank))
        exchange(what, out, into)

    comm.all_to_all = counting  # type: ignore[method-assign]
    optimizer.step()
    nbytes, num = float(sum(sent)), len(sent)
    return _seconds(optimizer, rounds), nbytes, num


def fsdp2(rank: int, world_size: int, shape: Shape, rounds: int) -> tuple[float, float, int]:
    """The same of FSDP2, sharded by blocks."""
    torch.manual_seed(0)
    model = Encoder(shape)
    mesh = init_device_mesh("cpu", (world_size,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    model(*make_batch(shape, 0, rank)).backward()
    optimizer = _muon(model)
    optimizer.step()
    with _Collectives() as collectives:
        optimizer.step()
    return _seconds(optimizer, rounds), collectives.nbytes, collectives.num


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shape = Shape(layers=options.layers, hidden=options.hidden, vocab=1024, seq=32, batch=2)
    rows: list[list[Any]] = []
    for name, worker, ranks in (
        ("alone", alone, 1),
        ("fxzero", ours, options.world_size),
        ("FSDP2", fsdp2, options.world_size),
    ):
        results = run_ranks(ranks, worker, shape, options.rounds, timeout=600)
        seconds, sent, num = zip(*results, strict=True)
        rows.append([name, ranks, 1e3 * max(seconds), 1e3 * sum(seconds), sum(sent) / MIB, max(num)])
    elements = sum(param.numel() for param in _matrices(Encoder(shape)))
    print(heading("python -m benchmarks.whole_matrices"))
    print(f"{options.layers} blocks of width {options.hidden}: {elements * 4 / MIB:.1f} MiB of matrices in fp32\n")
    headers = ["", "ranks", "ms of the slowest rank", "ms of all ranks", "MiB sent by all", "collectives"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
