"""What a memory budget keeps gathered, on real gloo ranks."""

from typing import Literal

import pytest

from fxzero.testing import run_ranks
from tests.distributed import memory_workers


@pytest.mark.parametrize("no_sync", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_micro_steps_gather_nothing_again_and_train_the_same(no_sync: bool) -> None:
    run_ranks(2, memory_workers.accumulate, no_sync)


def test_what_changes_the_shards_is_seen() -> None:
    run_ranks(2, memory_workers.changes)


def test_plans_made_before_the_choice_leave_the_places_alone() -> None:
    run_ranks(2, memory_workers.evaluation_first)


def test_ranks_with_different_shapes_keep_the_same() -> None:
    run_ranks(2, memory_workers.different_shapes)


def test_auto_keeps_what_fits() -> None:
    run_ranks(2, memory_workers.auto)


@pytest.mark.parametrize("no_sync", [False, True])
@pytest.mark.parametrize("budget", [None, "auto"])
def test_what_is_held_is_what_was_planned_and_steady_steps_allocate_nothing(
    budget: Literal["auto"] | None, no_sync: bool
) -> None:
    run_ranks(2, memory_workers.planned_and_measured, budget, no_sync)
