"""Frozen parameters that forward writes, on several ranks."""

from typing import Any

import pytest

from fxzero.testing import run_ranks
from tests.distributed import written_workers


@pytest.mark.parametrize(
    ("world_size", "name", "options"),
    [
        (2, "data", {}),
        (3, "in place", {}),
        (2, "in place", {"num_passes": 4}),
        pytest.param(2, "data", {"memory_budget": 20_000, "layout": "interleaved"}, marks=pytest.mark.exhaustive),
        pytest.param(2, "in place", {"recompute": "full"}, marks=pytest.mark.exhaustive),
        pytest.param(4, "data", {"mesh_shape": (2, 2), "across": "shard"}, marks=pytest.mark.exhaustive),
    ],
)
def test_they_train_as_replicas_do(world_size: int, name: str, options: dict[str, Any]) -> None:
    run_ranks(world_size, _train, name, options)


def _train(rank: int, world_size: int, name: str, options: dict[str, Any]) -> None:
    written_workers.train(rank, world_size, name, **options)


def test_buckets_that_stay_gathered_are_gathered_again_after_a_write() -> None:
    assert all(run_ranks(2, written_workers.add_up_with_resident_buckets))


def test_a_value_of_all_ranks_is_written_and_one_of_each_rank_refused() -> None:
    for error in run_ranks(2, written_workers.reduce_codes):
        assert "writes into parameter codes a value that depends on the input args[0]" in error
        assert "all_reduce" in error and "make codes a buffer" in error


@pytest.mark.parametrize("how", ["writes nothing", "another of many numbers"])
def test_ranks_that_write_something_else_are_told_in_the_next_phase(how: str) -> None:
    for error in run_ranks(2, written_workers.differ, how):
        assert error.startswith("RankMismatchError: Ranks do different things"), error
        assert "micro-batch 3 of step 1, behind a forward that wrote key.0.bias and 3 more changes" in error, error


@pytest.mark.parametrize("where", ["before forward", "behind forward"])
def test_a_step_that_is_left_out_has_written_nothing(where: str) -> None:
    run_ranks(3, written_workers.leave_out, where)


def test_parameters_that_are_rounded_on_the_way_are_refused() -> None:
    for error in run_ranks(2, written_workers.narrow):
        assert "is written by forward, and would be rounded to bfloat16 again in each step" in error
