"""Ranks that need different parameters in one step, or differentiate different outputs."""

import pytest

from fxzero.testing import run_ranks
from tests.distributed import heads_workers


@pytest.mark.parametrize("how", heads_workers.LOSSES)
@pytest.mark.parametrize("bucket_bytes", [1, pytest.param(2**20, marks=pytest.mark.exhaustive)])
def test_a_parameter_that_any_rank_reaches_is_stepped_on_all(how: str, bucket_bytes: int) -> None:
    run_ranks(2, heads_workers.train, how, bucket_bytes)


def test_three_ranks_each_in_turn() -> None:
    run_ranks(3, heads_workers.train, "heads in turn, others on each rank", 2**20)


def test_micro_batches_under_no_sync_reach_others_on_each_rank() -> None:
    run_ranks(2, heads_workers.train_under_no_sync)


@pytest.mark.parametrize("what", ["an image", pytest.param("a head", marks=pytest.mark.exhaustive)])
def test_a_rank_that_needs_more_than_was_agreed_on_is_refused(what: str) -> None:
    errors = run_ranks(2, heads_workers.differ_later, what, group_timeout=4.0)
    assert errors[1].startswith("PlanError: rank 1: this ") and "(Rank 0 has gone on without it.)" in errors[1]
    assert ("image.weight" if what == "an image" else "differentiates outputs [0, 1]") in errors[1]
    assert errors[0].startswith("CommunicationError: Rank 0")
