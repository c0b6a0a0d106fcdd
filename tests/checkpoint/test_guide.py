"""The snippets of docs/checkpoints.md, one after another, as one script on two ranks."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxzero
from fxzero.testing import run_ranks

GUIDE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def snippets(rank: int, world_size: int, folder: str) -> list[str]:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zero = fxzero.compile(model, optimizer=optimizer, example=torch.ones(2, 8))
    zero(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    names: dict[str, Any] = {"zero": zero, "optimizer": optimizer, "folder": folder, "fxzero": fxzero, "torch": torch}
    for snippet in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(snippet, names)
    return sorted(names["full"])


def test_the_snippets_run(tmp_path: Path) -> None:
    assert run_ranks(2, snippets, str(tmp_path)) == [["param_groups", "state"], []]
