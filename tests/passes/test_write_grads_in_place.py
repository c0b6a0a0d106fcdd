from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import PassOrderError
from fxzero.graph import ops
from fxzero.graph.nodes import Role, written_in_place
from fxzero.models import GPT, GPT_PRESETS, ROBERTA_PRESETS, RobertaForMaskedLM
from fxzero.passes import InsertReduceScatters, WriteGradsInPlace
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step


def test_matmul_writes_to_the_slot() -> None:
    step = toy_step(num_layers=1)
    run_passes(step, [InsertReduceScatters(), WriteGradsInPlace()])
    *_, (_, backward) = step.phases()
    product, slot = backward[2], backward[1]
    assert (product.target, product.kwargs) == (torch.ops.aten.mm.out, {"out": slot})
    assert (slot.target, slot.args) == (ops.grad_slot, ("layers.0.w", (64, 64)))
    assert (backward[3].target, backward[3].args) == (ops.write_grad, (product, "layers.0.w"))


def test_gradients_are_copied_under_no_sync() -> None:
    step = toy_step(num_layers=1)
    step.synchronize = False
    run_passes(step, [InsertReduceScatters(), WriteGradsInPlace()])
    assert [written_in_place(slot) for slot in step.nodes(Role.WRITE_GRAD)] == [None]


def test_gradient_with_another_reader_is_copied() -> None:
    step = toy_step(num_layers=1)
    step.set_output(step.model_outputs, step.grads, [step.grads["layers.0.w"]])
    run_passes(step, [InsertReduceScatters(), WriteGradsInPlace()])
    assert [written_in_place(slot) for slot in step.nodes(Role.WRITE_GRAD)] == [None]


def test_order_mistake_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertReduceScatters first"):
        WriteGradsInPlace()(toy_step())


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT(GPT_PRESETS["tiny"]),
        lambda: GPT(replace(GPT_PRESETS["tiny"], tied=False)),
        lambda: RobertaForMaskedLM(ROBERTA_PRESETS["tiny"]),
    ],
    ids=["gpt", "untied gpt", "roberta"],
)
def test_few_gradient_bytes_are_copied_in_transformers(build: Callable[[], nn.Module]) -> None:
    model = build()
    num_bytes = sum(param.nbytes for param in model.parameters())
    ids = torch.randint(2, 128, (2, 16))
    zero = fxzero.compile(model, example={"input_ids": ids, "labels": ids})
    copied = zero.schedule.totals.copied_grad_bytes
    assert 0 < copied <= 0.05 * num_bytes


class Table(nn.Module):
    """An embedding with a padding index, whose rows are read several times."""

    def __init__(self, padding_idx: int | None, scale: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5, padding_idx, scale_grad_by_freq=scale)

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        return (self.table(ids) * weights).sum()


@pytest.mark.parametrize(
    ("padding_idx", "scale", "dtype"),
    [
        (None, False, torch.float32),
        (2, False, torch.float32),
        (-1, False, torch.float32),
        (2, True, torch.float32),
        (None, False, torch.bfloat16),
        (None, False, torch.float16),
    ],
)
def test_embedding_rows_are_summed_as_in_eager(padding_idx: int | None, scale: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, reference = Table(padding_idx, scale).to(dtype), Table(padding_idx, scale).to(dtype)
    reference.load_state_dict(model.state_dict())
    ids, weights = torch.randint(0, 9, (4, 11)), torch.randn(4, 11, 5)
    zero = fxzero.compile(model)
    for module in (zero, reference):
        module(ids, weights).backward()
    (mine,), (theirs,) = zero.parameters(), reference.parameters()
    assert mine.grad is not None and theirs.grad is not None
    assert torch.equal(mine.grad.flatten(), theirs.grad.flatten())
    in_place = [written_in_place(slot) is not None for slot in zero.schedule.step.nodes(Role.WRITE_GRAD)]
    assert in_place == [not scale and dtype is torch.float32]
