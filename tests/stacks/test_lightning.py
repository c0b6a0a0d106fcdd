"""Lightning's Trainer and Fabric on compiled modules train, save and resume as with their DDP."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launched import launched
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fxzero
from fxzero.testing import run_ranks

pytestmark = pytest.mark.skipif(find_spec("lightning") is None, reason="needs lightning")


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    rows, labels = torch.randn(24, 8, generator=generator), torch.randint(3, (24,), generator=generator)
    return DataLoader(TensorDataset(rows, labels), batch_size=2)


def make_module() -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = make_net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val", cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    return Module()


def fit(folder: str, strategy: Any, world_size: int, *, epochs: int, resume: str | None = None) -> Any:
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = make_module()
    trainer.fit(module, loader(), loader(), ckpt_path=resume, weights_only=False)
    return trainer, module


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def fit_as_ddp(rank: int, world_size: int, folder: str) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    from fxzero.stacks.lightning import ZeroStrategy

    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    with launched(rank, world_size):
        expected, plain = fit(f"{folder}/ddp", DDPStrategy(), world_size, epochs=2)
        trainer, module = fit(f"{folder}/zero", ZeroStrategy(), world_size, epochs=2)
        assert isinstance(module.net, fxzero.ZeroModule)
        torch.testing.assert_close(weights(module), weights(plain))
        torch.testing.assert_close(trainer.callback_metrics, expected.callback_metrics)

        fit(f"{folder}/first", ZeroStrategy(), world_size, epochs=1)
        torch.distributed.barrier()
        (path,) = Path(folder, "first").rglob("*.ckpt")
        _, resumed = fit(f"{folder}/resumed", ZeroStrategy(), world_size, epochs=2, resume=str(path))
        torch.testing.assert_close(weights(resumed), weights(module))
        _, as_plain = fit(f"{folder}/as_plain", DDPStrategy(), world_size, epochs=2, resume=str(path))
        torch.testing.assert_close(weights(as_plain), weights(module))


def fabric_run(world_size: int, strategy: Any, *, is_compiled: bool = False) -> Any:
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    fabric = lightning.Fabric(
        accelerator="cpu", devices=world_size, strategy=strategy, plugins=[TorchElasticEnvironment()]
    )
    fabric.launch()
    torch.manual_seed(0)
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if is_compiled:
        model = fxzero.compile(model, optimizer=optimizer)
    return fabric, *fabric.setup(model, optimizer), fabric.setup_dataloaders(loader())


def fabric_train(fabric: Any, model: Any, optimizer: Any, batches: Any) -> None:
    for index, (rows, labels) in enumerate(batches):
        is_last = index % 2 == 1
        with fabric.no_backward_sync(model, enabled=not is_last):
            fabric.backward(cross_entropy(model(rows), labels))
        if is_last:
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()


def train_fabric_as_ddp(rank: int, world_size: int, folder: str) -> None:
    from lightning.fabric.strategies import DDPStrategy

    from fxzero.stacks.lightning import FabricZeroStrategy

    warnings.simplefilter("ignore")
    with launched(rank, world_size):
        expected = fabric_run(world_size, DDPStrategy())
        run = fabric_run(world_size, FabricZeroStrategy(), is_compiled=True)
        fabric, model, optimizer, _ = run
        for each in (expected, run):
            fabric_train(*each)
        torch.testing.assert_close(weights(model), weights(expected[1]))
        fabric.save(f"{folder}/state.ckpt", {"model": model, "optimizer": optimizer, "step": 3})
        fabric_train(*run)
        fresh = fabric_run(world_size, FabricZeroStrategy())
        state = {"model": fresh[1], "optimizer": fresh[2], "step": 0}
        fabric.barrier()
        fresh[0].load(f"{folder}/state.ckpt", state)
        assert state["step"] == 3
        fabric_train(*fresh)
        torch.testing.assert_close(weights(fresh[1]._forward_module), weights(model))


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 3))])
def test_lightning_does_as_with_ddp(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, fit_as_ddp, str(tmp_path), timeout=240)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_fabric_does_as_with_ddp(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, train_fabric_as_ddp, str(tmp_path), timeout=240)
