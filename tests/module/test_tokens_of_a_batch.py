"""Losses divided by a number of tokens that changes at each step: it is traced a few times, not for ever."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero


class Model(nn.Module):
    """Takes the number as an argument, as models of transformers do, or as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.num_items: Any = None

    def forward(self, ids: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = self.head(torch.tanh(self.words(ids)))
        total = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
        return total / (self.num_items if num_items_in_batch is None else num_items_in_batch)


def traces(caplog: pytest.LogCaptureFixture) -> int:
    return sum("traced and planned" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("how", "varies", "most"),
    [
        *((how, False, 3) for how in ("int", "float", "attribute")),
        *((how, True, 5) for how in ("int", "float", "attribute")),
        ("tensor", True, 3),
    ],
)
def test_a_number_of_tokens_is_traced_a_few_times(
    how: str, varies: bool, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fxzero.module.plan_maker")
    torch.manual_seed(0)
    model = Model()
    plain = copy.deepcopy(model)
    zero = fxzero.compile(model, accumulate=2)
    for step in range(9):
        number: Any = 17 + 3 * step
        ids = torch.randint(0, 11, (2, 5 + step * varies), generator=torch.Generator().manual_seed(step))
        number = {"float": number + 0.5, "tensor": torch.tensor(number)}.get(how, number)
        arguments = () if how == "attribute" else (number,)
        model.num_items = plain.num_items = number
        losses = zero(ids, *arguments), plain(ids, *arguments)
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for own, full in zip(zero.parameters(), plain.parameters(), strict=True):
            assert own.grad is not None and full.grad is not None
            assert torch.equal(own.grad.view(-1), full.grad.view(-1))
    assert traces(caplog) <= most
