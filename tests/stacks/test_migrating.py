"""The snippets of docs/migrating.md, one after another, as one script on two ranks."""

import logging
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launched import launched
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxzero
from fxzero.testing import run_ranks

pytestmark = pytest.mark.skipif(
    None in map(find_spec, ("accelerate", "lightning", "transformers")),
    reason="needs the libraries",
)
GUIDE = Path(__file__).parents[2] / "docs" / "migrating.md"


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def make_language_model() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, use_cache=False
    )
    return transformers.LlamaForCausalLM(config)


def make_lightning_module() -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Module()


def snippets(rank: int, world_size: int, folder: str) -> list[str]:
    from accelerate.state import AcceleratorState, GradientState
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rows = torch.randint(32, (8, 6), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(torch.randn(8, 8), torch.zeros(8, dtype=torch.int64))
    fabric_settings = {"accelerator": "cpu", "devices": world_size, "plugins": [TorchElasticEnvironment()]}
    names: dict[str, Any] = {
        "fxzero": fxzero,
        "torch": torch,
        "make_model": make_model,
        "make_language_model": make_language_model,
        "make_lightning_module": make_lightning_module,
        "loader": DataLoader(data, batch_size=2),
        "loss_fn": nn.functional.cross_entropy,
        "rows": [{"input_ids": row, "labels": row} for row in rows],
        "folder": folder,
        "settings": fabric_settings
        | {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder},
        "fabric_settings": fabric_settings,
    }
    with launched(rank, world_size):
        for snippet in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
            exec(snippet, names)
            torch.distributed.barrier()
    return sorted(path.name for path in Path(folder).iterdir())


def test_the_snippets_run(tmp_path: Path) -> None:
    found = ["accelerate", "checkpoints", "fabric.ckpt", "hf", "last.ckpt", "run"]
    assert run_ranks(2, snippets, str(tmp_path), timeout=240)[0] == found
