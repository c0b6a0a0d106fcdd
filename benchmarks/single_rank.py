"""A step at world size 1 against eager PyTorch, in turns: 12 layers, 42M parameters, batch 4 x 128, fused AdamW.

OMP_NUM_THREADS=1 python benchmarks/single_rank.py --rounds 12
"""

from __future__ import annotations

import argparse
import copy
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import fxzero
from fxzero.models import ROBERTA_PRESETS, RobertaForMaskedLM

CONFIG = replace(ROBERTA_PRESETS["small"], vocab_size=8192, max_positions=130, num_layers=12, dropout=0.0)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Callable[[], float]:
    def step() -> float:
        begin = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--default-malloc", action="store_true", help="leave both without keep_freed_memory()")
    arguments = parser.parse_args()
    kept = not arguments.default_malloc and fxzero.keep_freed_memory()
    torch.manual_seed(0)
    model = RobertaForMaskedLM(CONFIG)
    eager = copy.deepcopy(model)
    ids = torch.randint(5, CONFIG.vocab_size, (4, 128))
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    begin = time.perf_counter()
    zero = fxzero.compile(model, optimizer=optimizer, example=batch)
    compile_s = time.perf_counter() - begin
    steps = {
        "eager": make_step(eager, torch.optim.AdamW(eager.parameters(), lr=1e-4, fused=True), batch),
        "fxzero": make_step(zero, optimizer, batch),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    faults: dict[str, list[int]] = {name: [] for name in steps}
    for round_ in range(arguments.rounds + 2):
        for name, step in steps.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            seconds = step()
            if round_ >= 2:
                times[name].append(seconds)
                faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    count = sum(p.numel() for p in eager.parameters())
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
    )
    print(f"{count / 1e6:.1f}M parameters; compile {compile_s:.2f} s; {arguments.rounds} rounds; "
          f"freed memory {'kept' if kept else 'as malloc has it'}")  # fmt: skip
    for name, seconds in times.items():
        counts = faults[name]
        print(f"{name:8s} median {statistics.median(seconds):.3f} s  minimum {min(seconds):.3f} s")
        print(f"{'':8s} page faults a step: mean {statistics.mean(counts):.0f}  median {statistics.median(counts):.0f}")
    ratios = [a / b for a, b in zip(times["fxzero"], times["eager"], strict=True)]
    print(f"fxzero / eager: median of ratios {statistics.median(ratios):.3f}, "
          f"ratio of minima {min(times['fxzero']) / min(times['eager']):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
