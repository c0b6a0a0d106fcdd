"""The snippets of docs/checkpoints.md, one after another, as one script on two ranks."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import fxzero
from fxzero.testing import run_ranks

GUIDE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def snippets(rank: int, world_size: int, folder: str) -> list[str]:
    model, batch = make_model(), torch.ones(2, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zero = fxzero.compile(model, optimizer=optimizer, example=batch)
    zero(batch).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    names: dict[str, Any] = {"zero": zero, "optimizer": optimizer, "folder": folder, "batch": batch}
    if rank == 0:
        save_file(make_model().state_dict(), f"{folder}/model.safetensors")
    torch.distributed.barrier()
    names |= {"hf_folder": folder}
    names |= {"fxzero": fxzero, "torch": torch, "make_model": make_model}
    for snippet in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(snippet, names)
    assert (names["extra"], names["step"]) == ({"step": 100}, 100)
    return sorted(names["full"])


def test_the_snippets_run(tmp_path: Path) -> None:
    assert run_ranks(2, snippets, str(tmp_path)) == [["param_groups", "state"], []]
