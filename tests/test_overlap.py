"""`overlap_optimizer` without ranks: the generated code, the printed schedule, what is predicted."""

from __future__ import annotations

import ast
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxzero
from fxzero.bound import lower_bound
from fxzero.codegen import generate
from fxzero.cost import Cluster, Costs, Device, Link, roofline
from fxzero.ir import Role, StepGraph, head_gathers, members, tail_waits
from fxzero.overlap import Overlap
from fxzero.passes import default_passes
from fxzero.planner import plan
from fxzero.timeline import simulate
from fxzero.tuning import needs_of, tune
from fxzero.verify import collectives
from tests.test_codegen import ALLOWED


def planned(overlaps: bool, widths: tuple[int, ...] = (64, 64, 64, 64), **sizes: Any) -> StepGraph:
    with torch.device("meta"):
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
        model, x = nn.Sequential(*layers), torch.empty(16, widths[0])
    passes = default_passes(**({"bucket_bytes": 1} | sizes))
    return plan(model, (x,), world_size=2, passes=passes, overlap_optimizer=overlaps).step


def bodies(source: str) -> dict[str, list[str]]:
    """The statements of each function."""
    return {
        node.name: [ast.unparse(statement) for statement in node.body]
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("reduce_bytes", [1, 2**14, 2**20])
def test_backward_and_its_tail_are_the_backward_without_the_option(reduce_bytes: int) -> None:
    whole = bodies(generate(planned(False, reduce_bytes=reduce_bytes)).source)
    step = planned(True, reduce_bytes=reduce_bytes)
    code = generate(step)
    cut = bodies(code.source)
    assert list(cut) == ["forward", "backward", *(name for name, _ in code.tail)]
    assert cut["forward"] == whole["forward"]
    tail = [statement for name, _ in code.tail for statement in cut[name]]
    assert cut["backward"][:-1] + tail + cut["backward"][-1:] == whole["backward"]
    assert tail == [f"wait_{start.name}()" for start in step.nodes(Role.REDUCE_SCATTER)][-len(tail) :]
    assert [node for node in ast.walk(ast.parse(code.source)) if not isinstance(node, ALLOWED)] == []


def test_records_of_events_stay_behind_their_waits() -> None:
    step = planned(True)
    waits = tail_waits(step)
    code = generate(step, recorded=waits)
    for name, wait in code.tail:
        assert bodies(code.source)[name][-1] == f"record_{wait.name}()"


def test_schedule_says_that_the_optimizer_is_overlapped() -> None:
    step = planned(True)
    assert "optimizer overlapped" in str(fxzero.Schedule(step)).splitlines()[0]
    assert collectives(step)[-1] == f"may start before forward: the first {len(head_gathers(step))}"
    assert collectives(step)[:-1] == collectives(planned(False))


def costs_of(step: StepGraph, rate: float, optimizer_s: float, cpu: float = 0.0) -> Costs:
    costs = roofline(step, Cluster(Device(1e10, 1e12), Link(rate, 0.0, cpu)))
    return Costs(costs.seconds, costs.link, optimizer_s)


def test_last_reductions_hide_behind_the_optimizer() -> None:
    rate, optimizer_s = 1e6, 1.0
    apart, together = (simulate(step, costs_of(step, rate, optimizer_s)) for step in (planned(False), planned(True)))
    assert together.compute_s == pytest.approx(apart.compute_s)
    assert together.stalled_s < apart.stalled_s
    last = optimizer_s / 3  # the share of the bucket that arrives last
    assert apart.step_s - together.step_s <= optimizer_s - last + 1e-9
    assert together.step_s < apart.step_s


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.sampled_from([16, 64, 256]), min_size=3, max_size=6),
    rate=st.floats(1e6, 1e10),
    optimizer_s=st.floats(0.0, 1.0),
    load=st.floats(0.0, 0.5),
    bucket_bytes=st.sampled_from([1, 30_000, 2**20]),
)
def test_bound_is_never_above_the_prediction(
    widths: list[int], rate: float, optimizer_s: float, load: float, bucket_bytes: int
) -> None:
    step = planned(True, tuple(widths), bucket_bytes=bucket_bytes)
    costs = costs_of(step, rate, optimizer_s, load / rate)
    assert lower_bound(step, costs).step_s <= simulate(step, costs).step_s * (1 + 1e-9)


def test_bound_falls_by_what_the_optimizer_can_hide() -> None:
    rate, optimizer_s = 1e6, 0.001
    apart, together = (lower_bound(step, costs_of(step, rate, optimizer_s)) for step in (planned(False), planned(True)))
    assert together.busy_s == apart.busy_s
    assert together.tail_s == pytest.approx(apart.tail_s - optimizer_s)


def test_sizes_are_tuned_for_a_step_whose_optimizer_is_overlapped() -> None:
    step = planned(True)
    costs = costs_of(step, 1e7, 1.0)
    needs = needs_of(step, costs, Device(1e10, 1e12))
    tuning = tune(needs, keeps_all=False, keeps_free=False, buckets=[members(s) for s in head_gathers(planned(True))])
    assert tuning.inflight_bytes > 0


def test_option_does_nothing_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    zero = fxzero.compile(model, optimizer=optimizer, overlap_optimizer=True)
    zero(torch.randn(2, 8)).sum().backward()
    overlap: Overlap = zero._fxzero_engine.overlap
    assert not overlap.are_pending
    assert "optimizer overlapped" not in str(zero.schedule)
    zero.wait_for_gradients()
    optimizer.step()
    assert not zero._fxzero_engine.overlap.early._flying
