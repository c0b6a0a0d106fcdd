"""What a memory budget keeps gathered: never more than fits, as much as fits, the same on all ranks."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxzero
from fxzero.comm.gloo import GLOO
from fxzero.errors import PlanError
from fxzero.graph.nodes import Role, members
from fxzero.graph.recipe import Recipe
from fxzero.graph.step import StepGraph
from fxzero.memory.footprint import Footprint, Held, footprint_of
from fxzero.memory.lifetimes import Buffer, Kind, MemoryPlan, live_at
from fxzero.models import GPT, GPT_PRESETS
from fxzero.passes import default_passes
from fxzero.planning.keep_within_budget import _Gap as Gap
from fxzero.planning.keep_within_budget import _most_bytes as most_bytes
from fxzero.planning.keep_within_budget import fit_recipe, free_bytes, least
from fxzero.planning.run_passes import run_passes
from fxzero.planning.schedule import Schedule
from tests.helpers.toy_step import toy_step

NUM_POSITIONS = 12


@st.composite
def gaps_and_live(draw: st.DrawFn) -> tuple[list[Gap], list[Buffer]]:
    """Gaps that mirror each other around the middle, as those of a net do, or any."""
    gaps: list[Gap] = []
    for index in range(draw(st.integers(0, 7))):
        nested = draw(st.booleans())
        first = draw(st.integers(0, NUM_POSITIONS // 2 - 1))
        last = NUM_POSITIONS - 1 - first if nested else draw(st.integers(first, NUM_POSITIONS - 1))
        gaps.append(Gap((f"b{index}",), draw(st.integers(1, 6)), first, last))
    live = [
        Buffer(Kind.GATHER, "x", draw(st.integers(1, 8)), position, position)
        for position in draw(st.sets(st.integers(0, NUM_POSITIONS - 1)))
    ]
    return sorted(gaps, key=lambda gap: (-gap.nbytes, gap.last - gap.first)), live


@given(gaps_and_live(), st.integers(0, 30))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_knapsack_is_as_good_as_trying_all_subsets(given: tuple[list[Gap], list[Buffer]], room: int) -> None:
    gaps, live = given
    lean = Footprint(Held(), MemoryPlan(tuple(live), (0,) * len(live)), (), NUM_POSITIONS, 0)
    below = [room - nbytes for nbytes in live_at(live, NUM_POSITIONS)]

    def fits(subset: tuple[Gap, ...]) -> bool:
        return all(
            sum(gap.nbytes for gap in subset if gap.first <= position <= gap.last) <= max(below[position], 0)
            for position in range(NUM_POSITIONS)
        )

    subsets = (each for n in range(len(gaps) + 1) for each in itertools.combinations(gaps, n))
    best = max(sum(gap.nbytes for gap in subset) for subset in subsets if fits(subset))
    chosen = tuple(gap for gap in gaps if gap.fqns in most_bytes(gaps, lean, room))
    assert fits(chosen)
    assert sum(gap.nbytes for gap in chosen) == best


def gpt_schedule(budget: int | None, **sizes: Any) -> Schedule:
    with torch.device("meta"):
        model = GPT(dataclasses.replace(GPT_PRESETS["tiny"], num_layers=4))
    ids = torch.zeros(2, 16, dtype=torch.int64)
    recipe = Recipe(**{"bucket_bytes": 50_000, "prefetch_bytes": 60_000, "reduce_bytes": 60_000, **sizes})
    batch = {"input_ids": ids, "labels": ids}
    return fxzero.planner.plan(model, batch, world_size=2, passes=default_passes(recipe), memory_budget=budget)


def kept_bytes(schedule: Schedule) -> int:
    return sum(schedule.step.bucket(fqns).gathered.nbytes for fqns in schedule.step.kept)


@pytest.mark.exhaustive
def test_more_budget_keeps_more_and_never_needs_more_than_it() -> None:
    schedule = gpt_schedule(None)
    lean = schedule.memory.planned_peak_bytes
    kept: list[int] = []
    resident: list[int] = []
    for extra in (0, 50_000, 150_000, 800_000):
        schedule = gpt_schedule(lean + extra)
        assert schedule.memory.planned_peak_bytes <= lean + extra
        kept.append(kept_bytes(schedule))
        resident.append(len(schedule.step.resident))
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]
    buckets = [members(start) for start in schedule.step.nodes(Role.ALL_GATHER)]
    assert len(buckets) == len({*buckets}) == resident[-1] > resident[0]


def planned(captured: StepGraph, recipe: Recipe) -> StepGraph:
    step = captured.under(recipe)
    run_passes(step, default_passes(recipe))
    return step


def test_a_budget_just_below_the_default_plan_prefetches_less() -> None:
    captured = toy_step(num_layers=6, world_size=2)
    recipe = Recipe(bucket_bytes=2**14, prefetch_bytes=2**17, reduce_bytes=2**17)
    needed = footprint_of(planned(captured, recipe), GLOO, Held()).planned_peak_bytes
    assert not fit_recipe(captured, recipe, GLOO, lambda step: Held(), needed).is_tight
    chosen = fit_recipe(captured, recipe, GLOO, lambda step: Held(), needed - 1)
    assert chosen.is_tight
    assert footprint_of(planned(captured, chosen), GLOO, Held()).planned_peak_bytes < needed


def test_a_budget_that_nothing_fits_is_refused_with_what_is_needed() -> None:
    with pytest.raises(
        PlanError, match=r"memory_budget is 10 KiB; a step of this model needs .* on a rank: .* of para"
    ):
        gpt_schedule(10 * 1024)


def test_nothing_is_kept_where_the_shard_is_the_bucket() -> None:
    chosen = fit_recipe(toy_step(world_size=1), Recipe(), GLOO, lambda step: Held(), 2**30)
    assert chosen == Recipe(kept=(), recompute_level=0)


def test_a_bucket_with_a_gap_below_the_peak_costs_nothing() -> None:
    captured = toy_step(num_layers=6, world_size=2)
    recipe = Recipe(bucket_bytes=2**14, reduce_bytes=0, without=("prefetch",))
    needed = footprint_of(planned(captured, recipe), GLOO, Held())
    chosen = fit_recipe(captured, recipe, GLOO, lambda step: Held(), needed.planned_peak_bytes)
    assert chosen.kept
    assert not chosen.is_tight
    after = footprint_of(planned(captured, chosen), GLOO, Held())
    assert after.planned_peak_bytes == needed.planned_peak_bytes


def test_ranks_do_what_the_one_does_that_keeps_the_fewest_bytes() -> None:
    a, b = ("a",), ("b", "c")
    recipes = [Recipe(kept=(a, b), resident=(a,)), Recipe(kept=(b,), resident=(b,)), Recipe(kept=(b,), is_tight=True)]
    recipes.append(Recipe(kept=(a, b), recompute_level=3))
    assert least(recipes, {a: 10, b: 5}) == Recipe(kept=(b,), is_tight=True, recompute_level=3)
    recipes.append(Recipe())
    assert [Recipe.from_json(each.to_json()) for each in recipes] == recipes


def test_free_memory_is_shared_by_the_ranks_of_a_machine() -> None:
    whole, half = (free_bytes(torch.device("cpu"), ranks) for ranks in (1, 2))
    assert 2**20 < half < 0.7 * whole
