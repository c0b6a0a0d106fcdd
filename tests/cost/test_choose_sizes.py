"""Sizes and order chosen from costs: deterministic, no worse than what they replace, as the passes will write them."""

import dataclasses
import gc
import itertools

import pytest
import torch
from torch import fx, nn

from fxzero.capture import capture
from fxzero.comm.gloo import GLOO
from fxzero.cost.choose_sizes import _events, choose_sizes, needs_of
from fxzero.cost.job_costs import CostModel
from fxzero.cost.measured import ends_of_runs, seconds_by_name, seconds_by_run, with_measured
from fxzero.cost.model import GBIT, Cluster, Costs, Device, Link, roofline
from fxzero.cost.timeline import Event, events, play, simulate
from fxzero.graph.nodes import Role, members, role
from fxzero.graph.recipe import Recipe
from fxzero.graph.schedule_text import rows
from fxzero.graph.sharding import Axis, Placement, Sharding
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import WireFormat, gather_format
from fxzero.passes import (
    default_passes,
)
from fxzero.planning.plan import with_collectives
from fxzero.planning.run_passes import run_passes
from fxzero.runtime.shards import spec_of
from fxzero.runtime.stopwatch import Stopwatch, calm_median

SLOW = Cluster(Device(9e10, 1e10, 5e-6), Link(1 * GBIT, 2e-4, 1e-9))
NODES = dataclasses.replace(SLOW, inside=Link(8 * GBIT, 1e-4, 5e-10))
"""Ranks of a node are closer to each other."""


def captured_step(model: nn.Module, *inputs: torch.Tensor, world_size: int = 2) -> StepGraph:
    params = {fqn: spec_of(fqn, param) for fqn, param in model.named_parameters()}
    return capture(
        model,
        model.forward,
        inputs,
        {},
        params,
        device=torch.device("cpu"),
        sharding=Sharding.over(world_size),
        with_backward=True,
    ).step


def layers(*widths: int, batch: int = 256, world_size: int = 2) -> StepGraph:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
        return captured_step(model, torch.empty(batch, widths[0]), world_size=world_size)


def planned(step: StepGraph, recipe: Recipe) -> StepGraph:
    copy = step.under(recipe)
    run_passes(copy, default_passes(recipe), dump=False)
    return copy


def chosen(step: StepGraph, recipe: Recipe, model: CostModel, *, keeps_free: bool) -> Recipe:
    return choose_sizes(with_collectives(step, recipe), recipe, model, keeps_free=keeps_free)


MODELS = {"wide": (1024, 2048, 2048, 2048, 512), "head": (4096, 1024, 1024, 256), "tail": (256, 512, 1024, 8192)}


@pytest.mark.parametrize("kept", [0, None])
@pytest.mark.parametrize("rate", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("name", MODELS)
def test_choice_is_never_slower_than_the_default_sizes(name: str, rate: float, kept: int | None) -> None:
    step, recipe = layers(*MODELS[name]), Recipe(max_kept_bytes=kept)
    model = CostModel(dataclasses.replace(SLOW, link=Link(rate * GBIT, 2e-4, 1e-9)), GLOO)
    plans = [planned(step, each) for each in (recipe, chosen(step, recipe, model, keeps_free=False))]
    before, after = (simulate(each, model(each)).step_s for each in plans)
    assert after <= 1.005 * before


@pytest.mark.parametrize("across", ["replicate", "shard"])
def test_choice_for_nodes_knows_both_links(across: str) -> None:
    step, recipe = on_nodes(layers(512, *[512] * 24, world_size=4), across), Recipe()
    plans: list[StepGraph] = []
    for cluster in (NODES, SLOW):
        plans.append(planned(step, chosen(step, recipe, CostModel(cluster, GLOO), keeps_free=True)))
    informed, misled, default = (
        simulate(plan, CostModel(NODES, GLOO)(plan)).step_s for plan in (*plans, planned(step, recipe))
    )
    assert informed <= 1.003 * misled
    assert informed < default


def test_choice_is_the_same_every_time() -> None:
    step, model = layers(*MODELS["wide"]), CostModel(SLOW, GLOO)
    first, second = (chosen(step, Recipe(), model, keeps_free=True) for _ in range(2))
    assert first == second
    assert Recipe.from_json(first.to_json()) == first


def test_first_bucket_is_smaller_where_nothing_hides_it() -> None:
    step = layers(512, *[512] * 24)
    plan = planned(step, chosen(step, Recipe(), CostModel(SLOW, GLOO), keeps_free=False))
    sizes = [plan.payload_of(start).nbytes for start in plan.nodes(Role.ALL_GATHER)]
    assert sizes[0] < max(sizes)


WIRES: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "full": (None, None),
    "bf16 gathers": (torch.bfloat16, None),
    "int8 gathers": (torch.int8, None),
    "bf16 reductions": (None, torch.bfloat16),
    "both": (torch.int8, torch.bfloat16),
}


def on_nodes(step: StepGraph, across: Placement) -> StepGraph:
    """The same step on a mesh of two nodes."""
    shard_ranks = step.sharding.shard_ranks
    step.sharding = Sharding(Axis(shard_ranks if across == "replicate" else shard_ranks // 2), Axis(2, across))
    return step


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kept", [0, None])
@pytest.mark.parametrize("world_size", [2, 3])
def test_candidate_is_what_the_passes_write(world_size: int, kept: int | None, wire: str) -> None:
    """Every start and wait in its place, with the bytes that travel; and as long as the plan is predicted to take."""
    check_candidate(layers(*MODELS["wide"], world_size=world_size), SLOW, kept, *WIRES[wire])


@pytest.mark.parametrize("cluster", [SLOW, NODES], ids=["one link", "two links"])
@pytest.mark.parametrize("kept", [0, None])
@pytest.mark.parametrize("gathered", [None, torch.bfloat16])
@pytest.mark.parametrize("across", ["replicate", "shard"])
def test_candidate_on_nodes_is_what_the_passes_write(
    across: str, gathered: torch.dtype | None, kept: int | None, cluster: Cluster
) -> None:
    check_candidate(on_nodes(layers(*MODELS["wide"], world_size=4), across), cluster, kept, gathered, None)


def check_candidate(
    step: StepGraph, cluster: Cluster, kept: int | None, gathered: torch.dtype | None, reduced: torch.dtype | None
) -> None:
    inflight = 2**22
    recipe = Recipe(
        bucket_bytes=2**20,
        prefetch_bytes=inflight,
        reduce_bytes=inflight,
        max_kept_bytes=kept,
        gather_dtype=gathered,
        reduce_dtype=reduced,
    )
    prefix = with_collectives(step, recipe)
    formats = None if gathered is None else gather_format(gathered), None if reduced is None else WireFormat(reduced)
    needs = needs_of(prefix, roofline(prefix, cluster, GLOO), cluster.device, GLOO, *formats)
    plan = planned(step, recipe)
    groups = [plan.bucket(fqns) for fqns in dict.fromkeys(members(start) for start in plan.nodes(Role.ALL_GATHER))]
    candidate = list(_events(needs, groups, recipe))
    costs = roofline(plan, cluster, GLOO)
    told, real = play(candidate, costs.link, costs.inside), simulate(plan, costs)
    assert [_message(event) for event in candidate if event.key] == [
        _message(event) for event in events(plan, costs) if event.key
    ]
    assert told.wire_s == pytest.approx(real.wire_s)
    assert told.step_s == pytest.approx(real.step_s, rel=0.01)


def _message(event: Event) -> tuple[str, Role, tuple[str, ...], int, int]:
    key = event.key
    assert key is not None
    kind, fqns = (role(key), members(key)) if isinstance(key, fx.Node) else (key[0], key[2])
    return event.kind, kind, fqns, event.nbytes, event.across_bytes


def test_choice_for_narrow_buckets_is_no_slower_than_that_for_full_ones() -> None:
    step, model = layers(512, *[512] * 24), CostModel(SLOW, GLOO)
    narrow = {"gather_dtype": torch.int8, "reduce_dtype": torch.bfloat16}
    choices = [chosen(step, recipe, model, keeps_free=False) for recipe in (Recipe(**narrow), Recipe())]
    plans = [planned(step, dataclasses.replace(choice, **narrow)) for choice in choices]
    informed, misled = (simulate(plan, model(plan)).step_s for plan in plans)
    assert choices[0] != dataclasses.replace(choices[1], **narrow)
    assert informed <= 1.003 * misled


def test_what_is_kept_for_free_is_gathered_once() -> None:
    step = layers(1024, *[1024] * 8)
    recipe = chosen(step, Recipe(), CostModel(SLOW, GLOO), keeps_free=True)
    plan = planned(step, recipe)
    assert plan.kept
    assert sum(plan.bucket(fqns).gathered.nbytes for fqns in plan.kept) <= (recipe.max_kept_bytes or 0)


def test_buckets_that_are_there_stay() -> None:
    step, recipe = layers(*MODELS["wide"]), Recipe(bucket_bytes=2**20)
    plan = planned(step, recipe)
    buckets = tuple(dict.fromkeys(members(start) for start in plan.nodes(Role.ALL_GATHER)))
    fixed = dataclasses.replace(recipe, buckets=buckets)
    again = planned(step, chosen(step, fixed, CostModel(SLOW, GLOO), keeps_free=False))
    assert tuple(dict.fromkeys(members(start) for start in again.nodes(Role.ALL_GATHER))) == buckets


def test_reduction_starts_behind_the_gather_it_is_told() -> None:
    step = layers(256, *[256] * 6)
    recipe = Recipe(bucket_bytes=1, prefetch_bytes=0)
    plan = planned(step, recipe)
    (first, *_), gathers = plan.nodes(Role.REDUCE_SCATTER), plan.nodes(Role.ALL_GATHER)
    gather = next(node for node in gathers if node > first)
    moved = planned(step, dataclasses.replace(recipe, later=((members(first), members(gather)),)))
    starts = moved.nodes(Role.REDUCE_SCATTER, Role.ALL_GATHER)
    place = next(
        i for i, n in enumerate(starts) if n in moved.nodes(Role.REDUCE_SCATTER) and members(n) == members(first)
    )
    assert members(starts[place - 1]) == members(gather)


def test_measured_seconds_reach_the_nodes_of_another_plan() -> None:
    step = layers(*MODELS["wide"])
    first = planned(step, Recipe(bucket_bytes=2**20))
    estimated = roofline(first, SLOW, GLOO)
    runs = 1 + sum(2 for _ in first.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER, Role.WAIT)) + 1
    by_name = seconds_by_name(first, estimated, [2.0] * runs)
    costs = with_measured(first, estimated, by_name, 0.5, 1e-9)
    assert costs.optimizer_s == 0.5
    measured = [seconds for seconds in costs.seconds.values() if seconds]
    counted = len(_runs_with_cost(first, estimated))
    assert sum(measured) == pytest.approx(2.0 * counted)
    other = planned(step, Recipe(bucket_bytes=2**20, prefetch_bytes=2**24))
    again = with_measured(other, roofline(other, SLOW, GLOO), by_name, 0.5, 1e-9)
    assert sum(again.seconds.values()) == pytest.approx(sum(costs.seconds.values()), rel=1e-6)


def test_seconds_of_runs_alone_are_those_of_all_lines_and_waits_may_stay_estimates() -> None:
    step = planned(layers(*MODELS["wide"]), Recipe(bucket_bytes=2**20))
    lines, ends = list(rows(step)), ends_of_runs(step)
    assert len(ends) < len(lines)
    every, run, runs = [float(i + 1) for i in range(len(lines))], 0.0, list[float]()
    for i, seconds in enumerate(every):
        run += seconds
        runs.append(run if i in ends else 0.0)
        run = 0.0 if i in ends else run
    measured = seconds_by_run(step, every)
    assert seconds_by_run(step, runs) == measured
    estimated = roofline(step, SLOW, GLOO)
    without = seconds_by_name(step, estimated, measured, counts_waits=False)
    with_waits = seconds_by_name(step, estimated, measured)
    assert without == {name: seconds for name, seconds in with_waits.items() if not name.startswith("wait ")}
    assert without != with_waits


def _runs_with_cost(step: StepGraph, estimated: Costs) -> list[float]:
    runs, current = list[float](), 0.0
    for _, nodes in step.phases():
        for node in nodes:
            kind = node in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER), node in step.nodes(Role.WAIT)
            if any(kind):
                runs += [current] if current else []
                runs += [estimated.of(node)] if kind[1] and estimated.of(node) else []
                current = 0.0
            else:
                current += estimated.of(node)
        runs += [current] if current else []
        current = 0.0
    return runs


def test_measurement_of_another_step_is_not_used() -> None:
    step = planned(layers(64, 64), Recipe())
    assert seconds_by_name(step, roofline(step, SLOW, GLOO), [1.0]) == {}


def test_stopwatch_has_medians_of_like_steps_only() -> None:
    watch = Stopwatch([[1.0, 5.0], [3.0, 6.0]])
    assert watch.medians() == [1.0, 5.0]
    watch.steps.append([1.0])
    assert watch.medians() == []


def test_stopwatch_leaves_out_a_burst_of_noise_in_up_to_half_of_the_steps() -> None:
    steps = [[1.0, 5.0], [2.0, 4.5], [1.5, 4.0]]
    watch = Stopwatch([*steps, [9.0, 3.0], [1.0, 30.0]], others=[0.1, 0.2, 0.3, 4.0, 5.0])
    assert watch.medians() == [1.5, 4.5]
    assert calm_median(watch.others) == 0.2
    assert calm_median([]) == 0.0


def test_choosing_leaves_the_garbage_collector_as_it_was() -> None:
    step, model = with_collectives(layers(64, 64), Recipe()), CostModel(SLOW, GLOO)
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            choose_sizes(step, Recipe(), model, keeps_free=True)
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
