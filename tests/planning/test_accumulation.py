"""What is planned for `accumulate=`: gradients that stay unsharded, or are reduced into the shards by each backward."""

from typing import Any

import pytest
import torch

import fxzero
from fxzero.errors import PlanError
from fxzero.graph.recipe import Recipe
from fxzero.models import MLP, MLPConfig
from fxzero.passes import default_passes
from fxzero.planner import plan
from fxzero.planning.keep_within_budget import least
from fxzero.planning.schedule import Schedule

LAYERS, WIDTH = 6, 64
GRADIENTS = LAYERS * (WIDTH + 1) * WIDTH * 4


def planned(**options: Any) -> Schedule:
    with torch.device("meta"):
        model, x = (
            MLP(MLPConfig(WIDTH, WIDTH, WIDTH, num_layers=LAYERS)),
            torch.zeros(int(options.pop("rows", 32)), WIDTH),
        )
    return plan(model, x, world_size=options.pop("world_size", 2), **options)


def header(schedule: Schedule) -> str:
    return schedule.text().splitlines()[0]


def test_the_schedule_and_the_memory_say_that_gradients_stay_unsharded() -> None:
    schedule = planned(accumulate=4)
    assert "accumulate=4: unsharded gradients" in header(schedule)
    assert header(schedule).endswith("1 of 4 backwards reduces")
    held = schedule.memory.footprint.held.unsharded_gradients
    assert GRADIENTS <= held < 1.1 * GRADIENTS
    assert "unsharded gradients, accumulate=4" in str(schedule.memory)
    assert schedule.saved().recipe["accumulate"] == 4


@pytest.mark.parametrize(
    "options", [{"passes": default_passes(accumulate=4, unsharded=False)}, {"accumulate": 4, "world_size": 1}]
)
def test_gradients_are_reduced_into_the_shards_where_that_is_asked_for_or_nothing_travels(
    options: dict[str, Any],
) -> None:
    schedule = planned(**options)
    assert header(schedule).endswith("accumulate=4: each backward reduces into the shards")
    assert schedule.memory.footprint.held.unsharded_gradients == 0


def test_one_backward_of_a_step_and_evaluations_have_nothing_to_accumulate() -> None:
    with torch.no_grad():
        evaluated = planned(accumulate=4)
    assert "accumulate" not in header(planned(accumulate=1)) + header(evaluated)


def test_a_budget_without_room_for_unsharded_gradients_lets_each_backward_reduce() -> None:
    needed = planned(accumulate=4, passes=default_passes(max_kept_bytes=0)).memory.planned_peak_bytes
    roomy = planned(accumulate=4, memory_budget=2 * needed)
    assert "1 of 4 backwards reduces" in header(roomy)
    assert roomy.memory.planned_peak_bytes <= 2 * needed
    tight = planned(accumulate=4, memory_budget=needed - GRADIENTS // 2)
    assert "each backward reduces into the shards" in header(tight)
    assert tight.memory.planned_peak_bytes <= needed - GRADIENTS // 2
    with pytest.raises(PlanError, match="memory_budget is"):
        planned(accumulate=4, memory_budget=needed // 4)


def test_costs_decide_where_they_are_known() -> None:
    slow, fast = (fxzero.Cluster(fxzero.Device(1e11, 1e10, 0.0), fxzero.Link(rate, 0.0)) for rate in (1e7, 1e14))
    assert "1 of 4 backwards reduces" in header(planned(accumulate=4, cluster=slow))
    assert "each backward reduces" in header(planned(accumulate=4, cluster=fast, rows=2**20))


def test_all_ranks_reduce_each_time_where_one_of_them_must() -> None:
    bucket = ("a", "b")
    both = [Recipe(accumulate=2, unsharded=True, kept=()), Recipe(accumulate=2, unsharded=False, kept=(bucket,))]
    assert least(both, {bucket: 8}).unsharded is False
    assert least(both, {bucket: 8}).kept == ()


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_other_numbers_of_micro_batches_are_refused(number: object) -> None:
    with pytest.raises(ValueError, match="accumulate is .*; it must be a number of micro-batches"):
        fxzero.compile(torch.nn.Linear(2, 2), accumulate=number)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0, -1.0, float("inf"), float("nan"), True, "2"])
def test_gradients_are_divided_by_positive_numbers_alone(factor: object) -> None:
    with pytest.raises(ValueError, match="gradient_divide_factor is .*; it must be a positive number"):
        fxzero.compile(torch.nn.Linear(2, 2), gradient_divide_factor=factor)  # type: ignore[arg-type]
