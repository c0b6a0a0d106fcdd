"""The timeline: what overlaps, what waits, what traffic takes from compute."""

import pytest
import torch
from torch import nn

from fxzero.comm.gloo import GLOO
from fxzero.cost.model import Cluster, Device, Link, flops, roofline, rounded
from fxzero.cost.timeline import Event, Key, play, simulate
from fxzero.errors import FxzeroError, PlanError
from fxzero.graph.nodes import Role
from fxzero.graph.step import Phase
from fxzero.graph.traffic import Sent
from fxzero.passes import default_passes
from fxzero.planner import plan

FAST = Link(bytes_per_s=100.0)


def compute(seconds: float) -> Event:
    return Event("compute", seconds)


def start(key: int, nbytes: int) -> Event:
    return Event("start", 0.0, key, nbytes)


def wait(key: int) -> Event:
    return Event("wait", 0.0, key)


def test_message_hides_behind_compute() -> None:
    played = play([start(0, 100), compute(2.0), wait(0)], FAST)
    assert (played.step_s, played.stalls) == (2.0, {})


def test_wait_takes_what_compute_does_not_hide() -> None:
    played = play([start(0, 300), compute(2.0), wait(0), compute(1.0)], FAST)
    assert (played.step_s, played.stalls, played.stalled_s) == (4.0, {0: 1.0}, 1.0)


def test_messages_take_turns_in_the_order_of_starts() -> None:
    played = play([start(0, 100), start(1, 100), wait(1), wait(0)], FAST)
    assert played.stalls == {1: 2.0}
    assert played.wire_s == 2.0


def test_latency_delays_a_message_and_not_the_next_one() -> None:
    played = play([start(0, 100), start(1, 100), wait(1)], Link(100.0, latency_s=0.5))
    assert played.step_s == 2.5


def test_traffic_on_the_same_cores_slows_compute_while_it_lasts() -> None:
    link = Link(100.0, cpu_s_per_byte=0.0025)  # a quarter of the cores while the link is busy
    played = play([start(0, 100), compute(3.0), wait(0)], link)
    assert played.slowed_s == pytest.approx(0.25)
    assert played.step_s == pytest.approx(3.25)


def test_traffic_takes_half_of_the_cores_at_most() -> None:
    link = Link(100.0, cpu_s_per_byte=0.1)
    assert (link.load, link.loaded_bytes_per_s) == (0.5, 5.0)
    assert play([start(0, 10), compute(1.0)], link).step_s == pytest.approx(2.0)


NODE = Link(bytes_per_s=200.0)
GATHER = (Role.ALL_GATHER, Phase.FORWARD, ("gathered",))
REDUCE = (Role.REDUCE_SCATTER, Phase.BACKWARD, ("reduced",))


@pytest.mark.parametrize(("key", "node_is_busy_until"), [(GATHER, 2.0), (REDUCE, 1.0)])
def test_gather_crosses_nodes_first_and_a_reduction_last(key: Key, node_is_busy_until: float) -> None:
    behind = (Role.ALL_GATHER, Phase.BACKWARD, ("stays inside",))
    both = [Event.start(key, Sent(200, 100)), Event.start(behind, Sent(200))]
    played = play([*both, Event("wait", 0.0, key)], FAST, NODE)
    assert (played.step_s, played.wire_s) == (2.0, 3.0)
    assert play([*both, Event("wait", 0.0, behind)], FAST, NODE).step_s == node_is_busy_until + 1.0


def test_all_bytes_of_nodes_take_one_link_where_there_is_no_other() -> None:
    assert play([Event.start(REDUCE, Sent(200, 100)), Event("wait", 0.0, REDUCE)], FAST).step_s == 3.0


def test_both_links_slow_compute_while_they_are_busy() -> None:
    across, node = (
        Link(100.0, cpu_s_per_byte=0.0025),
        Link(200.0, cpu_s_per_byte=0.00125),
    )  # a quarter of the cores each
    far, near = (Role.ALL_GATHER, Phase.FORWARD, ("far",)), (Role.ALL_GATHER, Phase.FORWARD, ("near",))
    happening = [Event.start(far, Sent(0, 100)), Event.start(near, Sent(400)), compute(2.0)]
    played = play(happening, across, node)  # 0.5 of it in the first second, 0.75 in the second one
    assert played.slowed_s == pytest.approx(0.75)
    assert played.step_s == pytest.approx(2.75)


def step_of(world_size: int = 2) -> object:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)), torch.empty(32, 256)
    return plan(model, (x,), world_size=world_size, passes=default_passes(bucket_bytes=1)).step


def test_flops_of_a_step_are_those_of_its_matrix_products() -> None:
    step = step_of()
    counted = sum(flops(node) for node in step.nodes(Role.COMPUTE))
    forward = 2 * 32 * (256 * 512 + 512 * 64)
    assert counted == 3 * forward - 2 * 32 * 256 * 512  # the inputs need no gradient


def test_step_is_all_compute_when_the_link_is_free() -> None:
    step = step_of()
    costs = roofline(step, Cluster(Device(1e9, 1e12), Link(1e15)), GLOO)
    assert simulate(step, costs).step_s == pytest.approx(sum(costs.seconds.values()), rel=1e-6)


def test_slower_link_is_never_faster() -> None:
    step = step_of()
    times = [
        simulate(step, roofline(step, Cluster(Device(1e9, 1e12), Link(rate)), GLOO)).step_s for rate in (1e9, 1e7, 1e5)
    ]
    assert times[0] < times[1] < times[2]


def test_one_rank_has_no_traffic() -> None:
    step = step_of(1)
    assert simulate(step, roofline(step, Cluster(Device(1e9, 1e12), Link(1.0)), GLOO)).wire_s == 0.0


def test_cluster_has_a_name_or_numbers() -> None:
    assert Cluster.of("p4d.24xlarge").link.bytes_per_s == pytest.approx(6.25e9)
    own = Cluster(Device(1.0, 2.0, 3.0), Link(4.0, 5.0, 6.0))
    assert Cluster.of(own) is own
    nodes = Cluster(own.device, own.link, Link(7.0, 8.0, 9.0))
    assert Cluster.of_numbers(own.numbers()) == own
    assert Cluster.of_numbers(nodes.numbers()) == nodes
    with pytest.raises(PlanError, match=r"p4d\.24xlarge"):
        Cluster.of("p9")
    with pytest.raises(ValueError, match="positive"):
        Link(0.0)


def test_schedule_without_costs_says_how_to_get_them() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(8, 8), torch.empty(2, 8)
    schedule = plan(model, (x,), world_size=2)
    with pytest.raises(FxzeroError, match="cluster="):
        _ = schedule.timing
    assert "predicted" not in str(schedule)


def test_schedule_with_costs_prints_prediction_bound_and_ratio() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(512, 512), torch.empty(64, 512)
    schedule = plan(model, (x,), world_size=2, cluster=Cluster(Device(1e10, 1e11), Link(1e8, 1e-4)))
    timing = schedule.timing
    assert timing.lower_bound_s <= timing.predicted_step_s
    assert timing.ratio == pytest.approx(timing.predicted_step_s / timing.lower_bound_s)
    assert str(schedule).splitlines()[-1] == timing.line()
    assert timing.at_rate(1e7).predicted_step_s > timing.predicted_step_s


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (123456.0, 120000.0), (0.00987, 0.0099), (-1.0, 0.0)])
def test_measured_numbers_are_rounded_to_two_digits(value: float, expected: float) -> None:
    assert rounded(value) == pytest.approx(expected)
