from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture_helpers import check_against_eager
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x, scale=1.0):
        y = F.dropout(F.relu(self.norm(self.a(x)), inplace=True), 0.15) * scale
        return {"loss": self.b(self.frozen(y)).pow(2).mean(), "y": y}


def test_tied_frozen_and_unused_parameters_batch_norm_and_dropout():
    captured = check_against_eager(Tied(), torch.randn(4, 8), scale=2.0)
    assert captured.differentiable == (0, 1)
    assert captured.differentiated == (0,)
    assert set(captured.step.grads) == {"a.weight", "a.bias", "norm.weight", "norm.bias", "b.bias"}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.15, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_dropout_draws_and_rounds_as_in_eager(p, kind):
    check_against_eager(nn.Sequential(nn.Linear(6, 6), kind(p), nn.Linear(6, 6)), torch.randn(3, 5, 6))
