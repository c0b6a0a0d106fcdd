"""Accelerate's own Accelerator keeps compiled modules; training, saving and loading are those of its DDP."""

import copy
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
from fxzero.errors import FxzeroError, InputMismatchError
from fxzero.testing import run_ranks

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.1), nn.ReLU(), nn.Linear(12, 3))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    rows, labels = torch.randn(24, 8, generator=generator), torch.randint(3, (24,), generator=generator)
    return DataLoader(TensorDataset(rows, labels), batch_size=2)


class Run:
    """What `accelerator.prepare` returns, and the loop of Accelerate's documentation."""

    def __init__(self, accelerator: Any, *, is_compiled: bool) -> None:
        self.accelerator = accelerator
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        given = fxzero.compile(model, optimizer=optimizer) if is_compiled else model
        self.model, self.optimizer, self.loader, self.scheduler = accelerator.prepare(
            given, optimizer, loader(), scheduler
        )
        assert not is_compiled or self.model is given
        assert not is_compiled or accelerator.unwrap_model(self.model) is given

    def train(self) -> list[float]:
        norms = []
        for rows, labels in self.loader:
            with self.accelerator.accumulate(self.model):
                outputs = self.model(rows)
                assert outputs.dtype is torch.float32
                self.accelerator.backward(cross_entropy(outputs, labels))
                if self.accelerator.sync_gradients:
                    norms.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return [*norms, self.scheduler.get_last_lr()[0]]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.accelerator.get_state_dict(self.model).items()}


def reset() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train_as_ddp(rank: int, world_size: int, folder: str) -> None:
    from accelerate import Accelerator

    reset()
    if world_size > 1:
        lonely = Accelerator(cpu=True)
        with pytest.raises(InputMismatchError, match=f"has {world_size} ranks, and the Accelerator 1"):
            lonely.prepare(fxzero.compile(make_model()))
    reset()
    with launched(rank, world_size):
        expected, run = (
            Run(Accelerator(cpu=True, gradient_accumulation_steps=2), is_compiled=each) for each in (False, True)
        )
        torch.manual_seed(rank)
        numbers = expected.train()
        torch.manual_seed(rank)
        torch.testing.assert_close(run.train(), numbers)
        torch.testing.assert_close(run.weights(), expected.weights())
        gathered = run.accelerator.gather_for_metrics(torch.tensor([rank]))
        assert gathered.tolist() == list(range(world_size))

        run.accelerator.save_state(folder)
        state = copy.deepcopy(run.optimizer.state_dict())
        run.train()
        after = run.weights()
        run.accelerator.load_state(folder)
        torch.testing.assert_close(run.optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
        run.train()
        torch.testing.assert_close(run.weights(), after, rtol=0, atol=0)

        fresh = Run(Accelerator(cpu=True, gradient_accumulation_steps=2), is_compiled=True)
        fresh.accelerator.load_state(folder)  # before the layout is fixed
        fresh.train()
        torch.testing.assert_close(fresh.weights(), after)
    reset()


def train_under_autocast(rank: int, world_size: int) -> None:
    import accelerate

    from fxzero.stacks.accelerate import Accelerator

    reset()
    with launched(rank, world_size):
        plain = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        with pytest.raises(FxzeroError, match="take their form in fxzero.stacks"):
            plain.prepare(fxzero.compile(make_model()))
        expected = Run(plain, is_compiled=False)
        run = Run(
            Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2),
            is_compiled=True,
        )
        torch.manual_seed(rank)
        numbers = expected.train()
        torch.manual_seed(rank)
        torch.testing.assert_close(run.train(), numbers)
        torch.testing.assert_close(run.weights(), expected.weights())
    reset()


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_training_saving_and_loading_are_those_of_ddp(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, train_as_ddp, str(tmp_path))


def test_autocast_needs_the_accelerator_of_fxzero_on_several_ranks() -> None:
    run_ranks(2, train_under_autocast)
