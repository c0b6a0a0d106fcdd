"""Whole parameters in the place of shards, on several ranks."""

from collections.abc import Callable

import pytest

from fxzero.testing import run_ranks
from tests.distributed import summon_workers


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_block_on_whole_parameters_is_as_on_the_plain_model(world_size: int) -> None:
    layout = "interleaved" if world_size == 3 else "contiguous"
    run_ranks(world_size, summon_workers.like_the_plain_model, layout)


@pytest.mark.parametrize(
    "work",
    [
        summon_workers.other_values,
        summon_workers.other_names,
        summon_workers.one_does_not_enter,
        summon_workers.one_fails_inside,
    ],
)
def test_ranks_that_differ_are_told(work: Callable[..., None]) -> None:
    run_ranks(2, work)
