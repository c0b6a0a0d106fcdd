"""Methods beside forward on several ranks."""

from collections.abc import Callable

import pytest

from fxzero.testing import run_ranks
from tests.distributed import method_workers


def test_gradients_that_are_asked_for_are_means_over_the_ranks() -> None:
    run_ranks(2, method_workers.asked_gradients)


def test_methods_on_equal_batches_are_those_of_the_plain_model() -> None:
    run_ranks(2, method_workers.equal_batches)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_of_a_method_are_means_over_the_ranks(world_size: int) -> None:
    run_ranks(world_size, method_workers.own_batches)


@pytest.mark.parametrize(
    "work", [method_workers.another_method, method_workers.first_method_differs, method_workers.one_rank_generates]
)
def test_ranks_that_call_other_methods_are_told(work: Callable[..., None]) -> None:
    run_ranks(2, work)
