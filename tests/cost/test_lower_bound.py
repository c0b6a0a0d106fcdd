"""The lower bound against an exhaustive search: every order on the link, every place of every start."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxzero.comm.gloo import GLOO
from fxzero.cost.choose_sizes import best_order
from fxzero.cost.lower_bound import lower_bound
from fxzero.cost.model import GBIT, Cluster, Costs, Device, Link, roofline
from fxzero.cost.timeline import Event, events, play, simulate
from fxzero.graph.nodes import Role, members
from fxzero.graph.sharding import Placement
from fxzero.graph.step import StepGraph
from fxzero.passes import default_passes
from fxzero.planner import plan

MIB = 2**20
ALONE = default_passes(bucket_bytes=1, prefetch_bytes=0)
"""A bucket for each parameter: the units of the bound."""


def planned(
    widths: Sequence[int],
    rate: float,
    *,
    keep: bool = False,
    batch: int = 64,
    cpu: float = 0.0,
    across: Placement | None = None,
    inside: Link | None = None,
) -> tuple[StepGraph, Costs]:
    """A plan of linear layers without bias, and its costs: on two ranks, or on two nodes of two ranks."""
    with torch.device("meta"):
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
        model, x = nn.Sequential(*layers), torch.empty(batch, widths[0])
    passes = default_passes(bucket_bytes=1, prefetch_bytes=0, max_kept_bytes=None if keep else 0)
    nodes = {} if across is None else {"num_nodes": 2, "across": across}
    step = plan(model, (x,), world_size=2 if across is None else 4, passes=passes, **nodes).step
    return step, roofline(step, Cluster(Device(1e10, 1e12), Link(rate, 0.0, cpu), inside), GLOO)


def schedules(step: StepGraph, costs: Costs) -> Iterator[list[Event]]:
    """Every schedule in which starts are anywhere before their waits, and reductions after their gradients.

    Reductions are waited for last. Gathers of backward may not start in forward, as in any plan.
    """
    happening = events(step, costs)
    starts = [event for event in happening if event.kind == "start"]
    frame = [event for event in happening if event.kind != "start"]
    boundary = step.end_forward
    assert boundary is not None
    is_later = [isinstance(event.key, fx.Node) and event.key > boundary for event in happening]
    first_backward = is_later.index(True) if any(is_later) else len(happening)
    places: list[list[int]] = []
    for start in starts:
        index = happening.index(start)
        before = sum(event.kind != "start" for event in happening[:index])
        wait = next(i for i, event in enumerate(frame) if event.kind == "wait" and event.key is start.key)
        if start.key in step.nodes(Role.ALL_GATHER):
            in_backward = index >= first_backward
            low = sum(event.kind != "start" for event in happening[:first_backward]) if in_backward else 0
            places.append(list(range(low, wait + 1)))
        else:
            places.append(list(range(before, wait + 1)))
    for chosen in itertools.product(*places):
        for order in itertools.permutations(range(len(starts))) if len(starts) <= 4 else [tuple(range(len(starts)))]:
            schedule: list[Event] = []
            for position in range(len(frame) + 1):
                schedule += [starts[i] for i in order if chosen[i] == position]
                schedule += frame[position : position + 1]
            yield schedule


@pytest.mark.parametrize("cpu", [0.0, 1e-10])
@pytest.mark.parametrize("rate", [1e7, 1e8, 1e9])
@pytest.mark.parametrize("widths", [(64, 256, 32), (256, 16, 256), (32, 32, 512)])
def test_no_schedule_is_faster_than_the_bound(widths: tuple[int, ...], rate: float, cpu: float) -> None:
    step, costs = planned(widths, rate, keep=True, cpu=cpu)
    assert len(step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER)) == 4
    best = min(play(schedule, costs.link).step_s for schedule in schedules(step, costs))
    bound = lower_bound(step, costs)
    assert bound.step_s <= best * (1 + 1e-9)
    assert bound.step_s >= 0.8 * best  # tight enough to say something


@pytest.mark.parametrize("rate", [1e7, 1e8, 1e9])
@pytest.mark.parametrize("widths", [(64, 256, 32), (256, 16, 256), (32, 32, 512)])
def test_schedule_is_close_to_the_best_there_is(widths: tuple[int, ...], rate: float) -> None:
    step, costs = planned(widths, rate, keep=True)
    best = min(play(schedule, costs.link).step_s for schedule in schedules(step, costs))
    _, timeline = best_order(events(step, costs), costs)
    assert best * (1 - 1e-9) <= timeline.step_s <= 1.1 * best


@pytest.mark.parametrize("across", ["replicate", "shard"])
@pytest.mark.parametrize("rates", [(1e7, 1e8), (1e8, 1e8), (1e8, 1e7)])
@pytest.mark.parametrize("widths", [(64, 256, 32), (256, 16, 256)])
def test_no_schedule_of_nodes_is_faster_than_the_bound(
    widths: tuple[int, ...], rates: tuple[float, float], across: Placement
) -> None:
    step, costs = planned(widths, rates[0], keep=True, across=across, inside=Link(rates[1], 0.0, 1e-10))
    assert len(step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER)) == 4
    best = min(play(schedule, costs.link, costs.inside).step_s for schedule in schedules(step, costs))
    bound = lower_bound(step, costs)
    assert bound.step_s <= best * (1 + 1e-9)
    assert bound.step_s >= 0.65 * best  # one link's head hides none of the other's


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.sampled_from([16, 64, 256]), min_size=3, max_size=6),
    rates=st.tuples(st.floats(1e6, 1e10), st.floats(1e6, 1e10)),
    loads=st.tuples(st.floats(0.0, 0.9), st.floats(0.0, 0.9)),
    keep=st.booleans(),
    across=st.sampled_from(["replicate", "shard"]),
)
def test_bound_of_nodes_is_never_above_the_prediction(
    widths: list[int], rates: tuple[float, float], loads: tuple[float, float], keep: bool, across: Placement
) -> None:
    inside = Link(rates[1], 0.0, loads[1] / rates[1])
    step, costs = planned(widths, rates[0], keep=keep, cpu=loads[0] / rates[0], across=across, inside=inside)
    assert lower_bound(step, costs).step_s <= simulate(step, costs).step_s * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.sampled_from([16, 64, 256]), min_size=3, max_size=6),
    rate=st.floats(1e6, 1e10),
    keep=st.booleans(),
    load=st.floats(0.0, 0.5),
)
def test_bound_is_never_above_the_prediction(widths: list[int], rate: float, keep: bool, load: float) -> None:
    step, costs = planned(widths, rate, keep=keep, cpu=load / rate)
    bound = lower_bound(step, costs)
    assert bound.step_s <= simulate(step, costs).step_s * (1 + 1e-9)
    assert bound.busy_s + bound.head_s + bound.tail_s <= bound.step_s


def test_bound_counts_what_nothing_hides_when_the_link_is_slow() -> None:
    step, costs = planned((512, 512), 1e6)
    bound = lower_bound(step, costs)
    gathered = 512 * 512 * 4 / 2 / 1e6
    assert bound.head_s == pytest.approx(gathered, rel=1e-3)  # the first operator needs the only weight
    assert bound.tail_s == pytest.approx(gathered, rel=0.01)


def test_bound_is_compute_when_the_link_is_fast() -> None:
    step, costs = planned((512, 512), 1e15)
    assert lower_bound(step, costs).step_s == pytest.approx(sum(costs.seconds.values()), rel=1e-3)


def test_bound_of_one_rank_is_its_compute() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(64, 64), torch.empty(8, 64)
    cluster = Cluster(Device(1e10, 1e12), Link(GBIT))
    timing = plan(model, (x,), world_size=1, cluster=cluster).timing
    assert timing.lower_bound_s == timing.predicted_step_s == pytest.approx(timing.timeline.compute_s)
    assert "predicted / lower bound" in str(timing)


def test_bound_does_not_depend_on_buckets() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))), torch.empty(64, 256)
    cluster = Cluster(Device(1e10, 1e12), Link(1e8))
    bounds = []
    for bucket_bytes in (1, 300_000, 64 * MIB):
        step = plan(model, (x,), world_size=2, passes=default_passes(bucket_bytes=bucket_bytes)).step
        bounds.append(lower_bound(step, replace_waits(step, roofline(step, cluster, GLOO))))
    assert bounds[0].step_s == pytest.approx(bounds[1].step_s) == pytest.approx(bounds[2].step_s, rel=0.02)


def replace_waits(step: StepGraph, costs: Costs) -> Costs:
    """Without the copies at waits, which depend on padding."""
    return Costs({node: s for node, s in costs.seconds.items() if node not in step.nodes(Role.WAIT)}, costs.link)


def test_moved_reduction_is_the_one_that_delays_a_gather() -> None:
    step, costs = planned((1024, 16, 1024, 16), 2e7, batch=512)
    later, timeline = best_order(events(step, costs), costs)
    assert timeline.step_s <= simulate(step, costs).step_s
    known = {members(start) for start in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER)}
    assert {fqns for pair in later for fqns in pair} <= known
