"""`overlap_optimizer` on real ranks: the same training bit for bit, and work that really overlaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxzero.testing import run_ranks
from tests.distributed import overlap_workers as workers

OF_TWO_OPTIMIZERS = {"part_of_the_model": "halves"}
Case = tuple[str, str, dict[str, Any]]


def cases(*names: str, **options: Any) -> list[Case]:
    return [(name, OF_TWO_OPTIMIZERS.get(name, "adamw"), options) for name in names]


def test_training_is_the_same_whatever_happens_between() -> None:
    run_ranks(2, workers.compare, cases(*workers.SCENARIOS), timeout=120)


def test_training_is_the_same_on_three_ranks() -> None:
    several: list[Case] = [("plain", name, {}) for name in ("adamw_fused", "groups", "two")]
    names = ("accumulate", "shapes", "in_place", "evaluate", "part_of_the_model")
    run_ranks(3, workers.compare, [*several, *cases(*names)], timeout=120)


def test_training_is_the_same_for_every_optimizer() -> None:
    each: list[Case] = [("plain", name, {}) for name in (*workers.OPTIMIZERS, "groups", "two", "halves")]
    run_ranks(2, workers.compare, each, 3, timeout=120)


def test_training_is_the_same_with_other_plans() -> None:
    options: list[dict[str, Any]] = [
        {"layout": "interleaved"},
        {"without": "persistent_buffers"},
        {"without": "flat_collectives"},
        {"memory_budget": 2**24},
        {"sizes": {"max_kept_bytes": None}},
        {"sizes": {"gather_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16}},
        {"sizes": {"gather_dtype": torch.int8}},
        {"sizes": {"prefetch_bytes": 0, "reduce_bytes": 0}},
    ]
    several = [case for each in options for case in cases("shapes", "accumulate", **each)]
    run_ranks(2, workers.compare, several, 3, timeout=120)


def test_training_is_the_same_on_nodes_that_replicate() -> None:
    names = ("plain", "accumulate", "shapes", "part_of_the_model")
    run_ranks(4, workers.compare, cases(*names, mesh=(2, 2)), 3, timeout=120)


def test_training_is_the_same_through_the_steps_that_are_measured() -> None:
    run_ranks(2, workers.tuned, timeout=120)


@pytest.mark.parametrize("world_size", [2, 3])
def test_optimizer_works_while_reductions_are_in_flight(world_size: int) -> None:
    run_ranks(world_size, workers.order_of_work)


def test_gathers_start_with_the_step_and_are_taken_once() -> None:
    run_ranks(2, workers.early_gathers)


def test_gradients_that_are_written_to_in_flight_are_reported() -> None:
    run_ranks(2, workers.write_in_flight)


def test_ranks_end_with_gathers_in_flight() -> None:
    for world_size in (2, 3):
        run_ranks(world_size, workers.end_in_flight)


def test_model_is_freed_with_its_last_name() -> None:
    run_ranks(2, workers.freed)
