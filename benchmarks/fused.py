"""Forward and backward with fused compute at world size 1, in turns with other ways to run the same model.

    OMP_NUM_THREADS=1 python -m benchmarks.fused --rounds 8

The others are exact compute, eager fxzero, torch.compile and eager PyTorch. Six layers, 256 wide, 4 x 256 tokens (ViT:
8 images of 65 patches). Printed are medians of a step, the ratio to each other way (median of the ratios of the
rounds), the first step of each, and the bytes that fxzero saves for backward.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fxzero
from benchmarks.about import heading
from fxzero.models import GPT, GPT_PRESETS, LLAMA_PRESETS, ROBERTA_PRESETS, Llama, RobertaForMaskedLM

WIDTH, VOCAB, BATCH, TOKENS = 256, 4096, 4, 256
WARM_ROUNDS = 2


class ViT(nn.Module):
    """A vision transformer with a class token and a loss."""

    def __init__(self, num_layers: int, patch: int = 8, size: int = 64, classes: int = 100) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of the labels."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x[:, 0])), labels)


def build(name: str, num_layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and its batch."""
    torch.manual_seed(0)
    if name == "vit":
        return ViT(num_layers), {"x": torch.randn(2 * BATCH, 3, 64, 64), "labels": torch.randint(0, 100, (2 * BATCH,))}
    sizes: dict[str, Any] = {"num_layers": num_layers, "hidden_size": WIDTH, "num_heads": 4, "vocab_size": VOCAB}
    sizes["max_positions"] = TOKENS + 2
    if name == "gpt":
        model: nn.Module = GPT(replace(GPT_PRESETS["mini"], **sizes, dropout=0.0))
    elif name == "llama":
        model = Llama(replace(LLAMA_PRESETS["mini"], **sizes, num_kv_heads=2, ffn_size=688))
    else:
        model = RobertaForMaskedLM(replace(ROBERTA_PRESETS["mini"], **sizes, ffn_size=4 * WIDTH, dropout=0.0))
    ids = torch.randint(5, VOCAB, (BATCH, TOKENS))
    return model, {"input_ids": ids, "labels": ids}


def step_of(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], float]:
    """A function that runs forward and backward once, and returns the seconds they took."""

    def step() -> float:
        for param in model.parameters():
            param.grad = None
        begin = time.perf_counter()
        result = model(**batch)
        (result if isinstance(result, Tensor) else result.loss).backward()
        return time.perf_counter() - begin

    return step


def measure(name: str, num_layers: int, rounds: int) -> list[list[str]]:
    """The rows of a model, one for each way to run it."""
    model, batch = build(name, num_layers)
    modules: dict[str, nn.Module] = {
        "fused": fxzero.compile(copy.deepcopy(model), compute="fused"),
        "exact": fxzero.compile(copy.deepcopy(model), compute="exact"),
        "fxzero": fxzero.compile(copy.deepcopy(model)),
        "torch.compile": cast(nn.Module, torch.compile(copy.deepcopy(model))),
        "eager": model,
    }
    steps = {way: step_of(module, batch) for way, module in modules.items()}
    firsts = {way: step() for way, step in steps.items()}
    times: dict[str, list[float]] = {way: [] for way in steps}
    for round_ in range(rounds + WARM_ROUNDS):
        for way, step in steps.items():
            seconds = step()
            if round_ >= WARM_ROUNDS:
                times[way].append(seconds)
    rows: list[list[str]] = []
    for way, module in modules.items():
        ratios = [own / other for own, other in zip(times["fused"], times[way], strict=True)]
        is_ours = isinstance(module, fxzero.ZeroModule)
        saved = f"{module.schedule.memory.saved_bytes_at_peak / 2**20:.1f}" if is_ours else ""
        median = f"{1e3 * statistics.median(times[way]):.1f}"
        rows.append([name, way, median, f"{statistics.median(ratios):.3f}", f"{firsts[way]:.1f}", saved])
    torch.compiler.reset()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--models", nargs="+", default=["gpt", "llama", "roberta", "vit"])
    arguments = parser.parse_args()
    fxzero.keep_freed_memory()
    print(heading("python -m benchmarks.fused"))
    rows = [row for name in arguments.models for row in measure(name, arguments.layers, arguments.rounds)]
    columns = ("model", "way", "step ms", "fused / way", "first step s", "saved MiB")
    print(tabulate(rows, headers=columns, colalign=("left", "left", *["right"] * 4)))


if __name__ == "__main__":
    main()
