"""Fused compute on several ranks."""

from typing import Any

import pytest

from fxzero.testing import run_ranks
from tests.distributed import fused_workers


@pytest.mark.parametrize(
    ("world_size", "options", "policy"),
    [
        (2, {}, False),
        (2, {}, True),
        (2, {"loss_chunks": 3}, True),
        (2, {"loss_chunks": 3}, False),
        pytest.param(3, {"recompute": "full", "reshard_after_forward": False}, False, marks=pytest.mark.exhaustive),
    ],
)
def test_trains_as_replicas_do(world_size: int, options: dict[str, Any], policy: bool) -> None:
    digests = run_ranks(world_size, fused_workers.train, options, policy)
    assert len(set(digests)) == 1


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"recompute": "full", "stage": 2}, marks=pytest.mark.exhaustive)], ids=str
)
def test_exact_compute_trains_bit_for_bit(options: dict[str, Any]) -> None:
    digests = run_ranks(2, fused_workers.train_exactly, options)
    assert len(set(digests)) == 1
