"""`compile(accumulate=)` on ranks: bitwise as replicated training, whatever happens in the middle of a cycle."""

from typing import Any

import pytest

from fxzero.passes import default_passes
from fxzero.testing import run_ranks
from tests.distributed import accumulation_workers

INTO_SHARDS: dict[str, Any] = {"passes": default_passes(unsharded=False, bucket_bytes=1), "sums_first": False}


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_every_nth_backward_reduces_and_so_does_who_uses_gradients_before(world_size: int) -> None:
    headers = run_ranks(world_size, accumulation_workers.train, {})[0]
    if world_size == 1:
        assert all("accumulate=3: each backward reduces into the shards" in each for each in headers), headers
        return
    assert all("accumulate=3: unsharded gradients" in each for each in headers), headers
    assert all("1 of 3 backwards reduces" in each for each in headers), headers
    assert ["reduce_scatter" in each for each in headers] == [False, False, True]


def test_each_micro_batch_can_reduce_into_the_shards() -> None:
    headers = run_ranks(2, accumulation_workers.train, INTO_SHARDS)[0]
    assert all("accumulate=3: each backward reduces into the shards" in each for each in headers), headers
    assert all("reduce_scatter" in each for each in headers), headers


def test_what_cannot_be_right_in_the_middle_of_a_cycle_is_refused() -> None:
    for errors in run_ranks(2, accumulation_workers.refuse):
        assert "held unsharded, by no_sync() or accumulate=: .grad is a part" in errors["norm"], errors
        assert "was changed while no_sync() holds a part of it, or accumulate=" in errors["change"], errors
        assert "while no_sync() or accumulate= holds gradients" in errors["ask"], errors
        assert all(error.startswith("PlanError: ") for error in errors.values()), errors


@pytest.mark.parametrize("how", ["step", pytest.param("zero_grad", marks=pytest.mark.exhaustive)])
def test_ranks_at_different_micro_batches_are_named(how: str) -> None:
    for error in run_ranks(2, accumulation_workers.part, how):
        assert error.startswith("RankMismatchError: "), error
        assert ("reduction of gradients of Net" if how == "step" else "that holds gradients unsharded") in error, error


def test_scalers_find_infinities_in_reduced_gradients() -> None:
    run_ranks(2, accumulation_workers.scale)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"divisor": 1.0}, marks=pytest.mark.exhaustive),
        {"divisor": 2.5, "nodes": 3},
        pytest.param({"divisor": 1, **INTO_SHARDS}, marks=pytest.mark.exhaustive),
    ],
)
def test_sums_are_divided_by_the_factor(options: dict[str, Any]) -> None:
    run_ranks(3, accumulation_workers.train, {"gradient_divide_factor": options["divisor"], **options})


def test_gradients_of_one_rank_are_divided_too() -> None:
    run_ranks(1, accumulation_workers.train, {"gradient_divide_factor": 0.3, "divisor": 0.3})
