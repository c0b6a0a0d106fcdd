"""The snippets of docs/parameters.md, one after another, as one script on two ranks."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxzero
from fxzero.testing import run_ranks

GUIDE = Path(__file__).parents[2] / "docs" / "parameters.md"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU())
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def snippets(rank: int, world_size: int) -> None:
    model, batch = Model(), torch.ones(2, 8)
    names: dict[str, Any] = {"torch": torch, "nn": nn, "fxzero": fxzero, "model": model, "batch": batch}
    names["zero"] = fxzero.compile(model, example=batch)
    for snippet in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(snippet, names)


def test_the_snippets_run() -> None:
    run_ranks(2, snippets)
