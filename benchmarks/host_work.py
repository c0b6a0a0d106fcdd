"""Host work of a step: Python calls (cProfile) and seconds, against eager; 4 pre-norm blocks, hidden 64, 67 parameters.

OMP_NUM_THREADS=1 python benchmarks/host_work.py --world-size 2
OMP_NUM_THREADS=1 python benchmarks/host_work.py --world-size 1
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fxzero
from fxzero.testing import run_ranks


class Block(nn.Module):
    """A pre-norm transformer block with separate q, k, v and o."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    """4 blocks between an embedding and a head that has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.blocks = nn.Sequential(*(Block(64, 4) for _ in range(4)))
        self.norm = nn.LayerNorm(64, bias=False)
        self.head = nn.Linear(64, 100, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embedding(ids))))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _step(model: nn.Module, clip: Callable[[], Any], ids: Tensor) -> None:
    model(ids, ids).backward()
    clip()


def measure(rank: int, world_size: int, rounds: int) -> dict[str, float]:
    """Calls of one step, and seconds and CPU seconds of this thread per step, in turns with eager."""
    torch.manual_seed(0)
    eager, model = Net(), Net()
    zero = fxzero.compile(model)
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (zero, eager)]
    ids = torch.randint(0, 100, (4, 16))
    steps = {
        "fxzero": lambda: _step(zero, lambda: zero.clip_grad_norm_(1.0), ids),
        "eager": lambda: _step(eager, lambda: nn.utils.clip_grad_norm_(eager.parameters(), 1.0), ids),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    result: dict[str, float] = {}
    for round_ in range(rounds + 10):
        for (name, step), optimizer in zip(steps.items(), optimizers, strict=True):
            begin, begin_cpu = time.perf_counter(), time.thread_time()
            step()
            if round_ >= 10:
                seconds[name].append(time.perf_counter() - begin)
                cpu[name].append(time.thread_time() - begin_cpu)
            optimizer.step()
            optimizer.zero_grad()
    for name, step in steps.items():
        profile = cProfile.Profile()
        profile.runcall(step)
        result[f"{name} calls"] = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
        result[f"{name} ms"] = statistics.median(seconds[name]) * 1e3
        result[f"{name} thread ms"] = statistics.median(cpu[name]) * 1e3
    operators = [node for node in zero.schedule.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    result["ATen operators in the joint graph"] = len(operators)
    result["parameters"] = len(list(zero.parameters()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    from host_work import measure as importable  # ranks import this file by its name

    results = run_ranks(arguments.world_size, importable, arguments.rounds, timeout=300)
    print(
        f"torch {torch.__version__}, world size {arguments.world_size}, {arguments.rounds} rounds, rank 0, no optimizer"
    )
    for name, value in results[0].items():
        print(f"{name:40s} {value:10.2f}")


if __name__ == "__main__":
    main()
