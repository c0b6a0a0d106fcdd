"""Choose what stays gathered under a memory budget: a knapsack, with the exact bytes of the plan that comes of it.

arena bytes   |        ____                 Keeping a bucket from its last reader in forward to its first in
              |   ____|    |____   room     backward fills the gap between them. Where the arena is below its
              |  |              |___        room all along the gap, that costs nothing at all.
              +---[ gap of a bucket ]-->    position
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fxzero.comm.backend import Backend
from fxzero.errors import PlanError
from fxzero.graph.liveness import live_until
from fxzero.graph.names import format_bytes
from fxzero.graph.nodes import Role, members
from fxzero.graph.recipe import Fqns, Recipe
from fxzero.graph.schedule_text import totals
from fxzero.graph.step import Phase, StepGraph
from fxzero.graph.traffic import sent_in
from fxzero.memory.footprint import Footprint, Held, footprint_of
from fxzero.memory.lifetimes import live_at
from fxzero.passes import RecomputeActivations, RematerializeViews, default_passes
from fxzero.planning.run_passes import run_passes

MAX_TRIED = 20_000
"""Choices that the knapsack looks at; it then takes the best so far."""
AUTO_SHARE = 0.9
"""The part of free memory that "auto" plans with; the rest is for what is not planned, such as the libraries' own."""


def fit_recipe(
    captured: StepGraph,
    recipe: Recipe,
    backend: Backend,
    held_by: Callable[[StepGraph], Held],
    budget_bytes: int | None,
) -> Recipe:
    """The recipe with what depends on the inputs: how far to recompute, and what stays gathered under a budget.

    Kept are the buckets with the most bytes that fit. Where gradients may be kept unsharded over micro-batches, and
    that fits, buckets are chosen with and without it, and that choice is taken which sends fewer bytes.

    Args:
        captured: a traced step before any pass; it stays as it is.
        held_by: what a rank holds from step to step, given a complete plan.
        budget_bytes: None leaves it to the recipe what to keep.

    Raises:
        PlanError: the budget is less than a step needs that keeps nothing.
    """
    recipe = replace(recipe, recompute_level=_recompute_level(captured, recipe))
    if budget_bytes is None:
        return recipe
    into_shards = replace(recipe, unsharded=False) if recipe.accumulate > 1 else recipe
    chosen = _fit_buckets(captured, into_shards, backend, held_by, budget_bytes)
    if not recipe.keeps_unsharded:
        return chosen
    try:
        unsharded = _fit_buckets(captured, replace(recipe, unsharded=True), backend, held_by, budget_bytes)
    except PlanError:
        return chosen
    return min((unsharded, chosen), key=lambda each: _sent_bytes(captured, each))


def _sent_bytes(captured: StepGraph, recipe: Recipe) -> int:
    """Bytes that a rank sends and receives in all micro-batches of one step of the optimizer."""
    step = captured.under(recipe)
    run_passes(step, default_passes(recipe), dump=False)
    moved, again = totals(step), recipe.accumulate - 1
    resident = [start for start in step.nodes(Role.ALL_GATHER) if members(start) in recipe.resident]
    gathered = moved.gathered_bytes * recipe.accumulate - again * sum(sent_in(step, each).total for each in resident)
    return gathered + moved.reduced_bytes * (1 if recipe.keeps_unsharded else recipe.accumulate)


def _fit_buckets(
    captured: StepGraph, recipe: Recipe, backend: Backend, held_by: Callable[[StepGraph], Held], budget_bytes: int
) -> Recipe:
    """The recipe with the buckets that stay gathered; see `fit_recipe`."""

    def plan(recipe: Recipe) -> tuple[StepGraph, Footprint]:
        step = captured.under(recipe)
        run_passes(step, default_passes(recipe), dump=False)
        return step, footprint_of(step, backend, held_by(step))

    recipe = replace(recipe, kept=())
    step, lean = plan(recipe)
    if lean.planned_peak_bytes > budget_bytes:
        recipe = replace(recipe, is_tight=True)
        step, lean = plan(recipe)
    if lean.planned_peak_bytes > budget_bytes:
        raise PlanError(
            f"memory_budget is {format_bytes(budget_bytes)}; a step of this model needs "
            f"{format_bytes(lean.planned_peak_bytes)} on a rank: {format_bytes(lean.held.total)} of parameters, "
            f"gradients, optimizer state and buffers, {format_bytes(lean.arena_bytes)} for communication, "
            f'{format_bytes(lean.activation_peak_bytes)} of activations. Pass recompute="full", smaller batches, more '
            "ranks, or a larger budget."
        )
    if captured.sharding.shard_ranks == 1:  # the shards are the buckets
        return recipe
    gaps = _gaps(step)
    limit = budget_bytes - lean.held.total - lean.activation_peak_bytes
    while kept := _most_bytes(gaps, lean, limit):
        recipe = replace(recipe, kept=kept)
        step, needed = plan(recipe)
        over = needed.planned_peak_bytes - budget_bytes
        if over <= 0:
            break
        limit = min(limit - over, _filled_bytes(gaps, lean, kept) - 1)  # the same buckets do not fit again
    else:
        recipe = replace(recipe, kept=())
        step, _ = plan(recipe)

    def fits(resident: tuple[Fqns, ...]) -> bool:
        step.resident = resident
        return footprint_of(step, backend, lean.held).planned_peak_bytes <= budget_bytes

    once = [fqns for fqns in map(members, step.nodes(Role.ALL_GATHER)) if fqns not in {gap.fqns for gap in gaps}]
    held = {gap.fqns: gap.last - gap.first for gap in gaps}
    kept = sorted(recipe.kept or (), key=lambda fqns: -held[fqns])  # what is live for most of the step first
    return replace(recipe, resident=_longest_that_fits([*kept, *once], fits))


def depends_on_inputs(recipe: Recipe, memory_budget: object) -> bool:
    """True if something is chosen by the first inputs that must then be the same for all."""
    return memory_budget is not None or isinstance(recipe.recompute, int)


def _recompute_level(captured: StepGraph, recipe: Recipe) -> int:
    """How far the passes recompute activations of this step."""
    step = captured.under(recipe)
    run_passes(step, [RematerializeViews()], dump=False)
    return RecomputeActivations(recipe.recompute).level_for(step)


def least(recipes: Sequence[Recipe], nbytes: Mapping[Fqns, int]) -> Recipe:
    """What ranks that met different shapes do all alike: what the one does that keeps the fewest bytes.

    Args:
        nbytes: of each bucket.
    """

    def kept_bytes(recipe: Recipe) -> tuple[int, int, str]:
        sums = [sum(nbytes[fqns] for fqns in buckets or ()) for buckets in (recipe.kept, recipe.resident)]
        return sums[0], sums[1], repr(recipe)

    chosen = min(recipes, key=kept_bytes)
    level = max(recipe.recompute_level or 0 for recipe in recipes)
    is_tight = any(recipe.is_tight for recipe in recipes)
    unsharded = False if any(recipe.unsharded is False for recipe in recipes) else chosen.unsharded
    return replace(chosen, is_tight=is_tight, recompute_level=level, unsharded=unsharded)


def _longest_that_fits(order: Sequence[Fqns], fits: Callable[[tuple[Fqns, ...]], bool]) -> tuple[Fqns, ...]:
    """The longest beginning of `order` that fits, by bisection."""
    fit, over = 0, len(order) + 1
    while over - fit > 1:
        number = (fit + over) // 2
        if fits(tuple(order[:number])):
            fit = number
        else:
            over = number
    return tuple(order[:fit])


@dataclass(frozen=True)
class _Gap:
    """Positions `[first, last]` at which a bucket would be live if it were kept, and is not if it is gathered again."""

    fqns: Fqns
    nbytes: int
    first: int
    last: int


def _gaps(step: StepGraph) -> list[_Gap]:
    """The gaps of a plan that keeps nothing, the largest buckets first, of equal ones those with the shortest gap."""
    at, phase_of = step.positions(), step.phase_of()
    ends: dict[Fqns, int] = {}
    gaps: list[_Gap] = []
    for start in step.nodes(Role.ALL_GATHER):
        fqns = members(start)
        if phase_of[start] is Phase.FORWARD:
            ends[fqns] = at[live_until(step, start)]
        elif fqns in ends:
            gaps.append(_Gap(fqns, step.payload_of(start).nbytes, ends[fqns] + 1, at[start] - 1))
    return sorted(gaps, key=lambda gap: (-gap.nbytes, gap.last - gap.first))


def _most_bytes(gaps: Sequence[_Gap], lean: Footprint, arena_bytes: int) -> tuple[Fqns, ...]:
    """The gaps whose sum is largest while the arena stays within `arena_bytes` at every position."""
    room = arena_bytes - torch.tensor(live_at(lean.arena.buffers, lean.num_positions), dtype=torch.int64)
    rest = [0] * (len(gaps) + 1)
    for index in reversed(range(len(gaps))):
        rest[index] = rest[index + 1] + gaps[index].nbytes
    best, best_bytes, tried = list[int](), 0, 0
    taken, taken_bytes, index = list[int](), 0, 0
    while True:
        tried += 1
        if index < len(gaps) and taken_bytes + rest[index] > best_bytes:
            gap = gaps[index]
            place = room[gap.first : gap.last + 1]
            if bool((place >= gap.nbytes).all()):
                place -= gap.nbytes
                taken.append(index)
                taken_bytes += gap.nbytes
                index += 1
            else:
                index = _next_size(gaps, index)
            continue
        if taken_bytes > best_bytes:
            best, best_bytes = list(taken), taken_bytes
        if not taken or best_bytes == rest[0] or tried > MAX_TRIED:
            return tuple(gaps[index].fqns for index in sorted(best))
        index = taken.pop()
        gap = gaps[index]
        room[gap.first : gap.last + 1] += gap.nbytes
        taken_bytes -= gap.nbytes
        index = _next_size(gaps, index)


def _filled_bytes(gaps: Sequence[_Gap], lean: Footprint, kept: Sequence[Fqns]) -> int:
    """The most live bytes of the arena where the gaps of the kept buckets are filled."""
    live = torch.tensor(live_at(lean.arena.buffers, lean.num_positions), dtype=torch.int64)
    filled = [gap for gap in gaps if gap.fqns in kept]
    for gap in filled:
        live[gap.first : gap.last + 1] += gap.nbytes
    return max(int(live[gap.first : gap.last + 1].max()) for gap in filled)


def _next_size(gaps: Sequence[_Gap], index: int) -> int:
    """The first gap after one that was not taken that may still be: a longer one of the same bytes does no better."""
    after = index + 1
    while after < len(gaps) and gaps[after].nbytes == gaps[index].nbytes and _contains(gaps[after], gaps[index]):
        after += 1
    return after


def _contains(outer: _Gap, inner: _Gap) -> bool:
    return outer.first <= inner.first and inner.last <= outer.last


def free_bytes(device: torch.device, ranks_here: int) -> int:
    """Bytes that a rank may still use: free memory of its accelerator, or its part of the machine's.

    Args:
        ranks_here: ranks that share the machine's memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _machine_bytes() // ranks_here


def _machine_bytes() -> int:
    """Memory that this machine, or the control group this process is in, has left."""
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        left = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        left = min(left, int(limit.read_text()) - int(used.read_text()))
    return max(left, 0)
