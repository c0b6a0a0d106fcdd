"""One hand-broken graph per rule."""

from __future__ import annotations

import operator

import pytest

from fxzero import errors, ops
from fxzero.ir import Role, StepGraph, gathered_params, operands, release_of, wait_of
from fxzero.passes import InsertAllGathers, ReleaseParams, RematerializeViews, default_passes
from fxzero.pipeline import run_passes
from fxzero.verify import verify_graph, verify_plan
from tests.toy import toy_step


def planned() -> StepGraph:
    step = toy_step()
    run_passes(step, default_passes(bucket_bytes=2**15))
    return step


def test_planned_step_is_accepted() -> None:
    verify_plan(planned())


def test_read_before_its_input_is_refused() -> None:
    step = planned()
    start = step.nodes(Role.ALL_GATHER)[0]
    start.prepend(wait_of(start))
    with pytest.raises(errors.MalformedGraphError, match="'wait layers.0.w .1' stands before"):
        verify_graph(step)


def test_read_without_gather_is_refused() -> None:
    step = planned()
    output = next(iter(gathered_params(wait_of(step.nodes(Role.ALL_GATHER)[0])).values()))
    output.replace_all_uses_with(step.param_nodes()["layers.0.w"])
    with pytest.raises(errors.ReadWithoutGatherError, match="layers.0.w is read by 'compute layers.0'"):
        verify_graph(step)


def test_gather_without_wait_is_refused() -> None:
    step = planned()
    with step.graph.inserting_before(step.end_forward):
        step.graph.call_function(ops.all_gather, operands(step.nodes(Role.ALL_GATHER)[0]))
    with pytest.raises(errors.MissingWaitError, match="still in flight at the end of forward"):
        verify_graph(step)


def test_two_waits_for_one_start_are_refused() -> None:
    step = planned()
    start = step.nodes(Role.REDUCE_SCATTER)[0]
    with step.graph.inserting_before(step.output):
        step.graph.call_function(ops.wait, (start,))
    with pytest.raises(errors.MissingWaitError, match="waited for twice"):
        verify_graph(step)


def test_gathered_param_read_in_the_other_phase_is_refused() -> None:
    step = toy_step(num_layers=1)
    InsertAllGathers()(step)
    (start,) = step.nodes(Role.ALL_GATHER)
    output = next(iter(gathered_params(wait_of(start)).values()))
    backward_reader = step.grads["layers.0.w"]
    backward_reader.args = (backward_reader.args[0], output)
    with pytest.raises(errors.PhaseError, match="layers.0.w is gathered in forward and read by"):
        verify_graph(step)


def test_read_after_release_is_refused() -> None:
    step = planned()
    wait = wait_of(step.nodes(Role.ALL_GATHER)[0])
    release = release_of(wait)
    assert release is not None
    wait.append(release)
    for output in reversed(gathered_params(wait).values()):
        wait.append(output)
    with pytest.raises(
        errors.UseAfterReleaseError, match=r"layers\.0\.w is read by 'compute layers\.0' after its release"
    ):
        verify_graph(step)


def test_second_release_is_refused() -> None:
    step = planned()
    wait = wait_of(step.nodes(Role.ALL_GATHER)[-1])
    with step.graph.inserting_before(step.output):
        step.graph.call_function(ops.release, (wait,))
    with pytest.raises(errors.DoubleReleaseError, match="released twice"):
        verify_graph(step)


def test_missing_release_is_refused_in_a_plan_only() -> None:
    step = planned()
    step.graph.erase_node(step.nodes(Role.RELEASE)[0])
    verify_graph(step)
    with pytest.raises(errors.MissingReleaseError, match="gathered and never released"):
        verify_plan(step)


def test_gradient_reduced_twice_is_refused() -> None:
    step = planned()
    start = step.nodes(Role.REDUCE_SCATTER)[0]
    with step.graph.inserting_before(step.output):
        again = step.graph.call_function(ops.reduce_scatter, operands(start))
        step.graph.call_function(ops.wait, (again,))
    with pytest.raises(errors.GradientReduceError, match="is reduced twice"):
        verify_graph(step)


def test_gradient_never_reduced_is_refused_in_a_plan() -> None:
    step = toy_step()
    with pytest.raises(errors.GradientReduceError, match="never reduced"):
        run_passes(step, [RematerializeViews(), InsertAllGathers(), ReleaseParams()])


def test_bucket_of_frozen_and_trained_params_is_refused() -> None:
    step = toy_step(frozen=1)
    params = step.param_nodes()
    run_passes(step, default_passes())
    start = step.nodes(Role.ALL_GATHER)[0]
    start.args = (params["layers.0.w"], params["layers.1.w"])
    with pytest.raises(errors.BucketError, match="mixes dtypes, or frozen with trained"):
        verify_graph(step)


def test_param_in_two_buckets_is_refused() -> None:
    step = planned()
    params = step.param_nodes()
    first = step.nodes(Role.ALL_GATHER)[0]
    first.args = (params["layers.0.w"], params["layers.2.w"])
    with pytest.raises(errors.BucketError, match="gathered in two different buckets"):
        verify_graph(step)


def test_reduction_of_another_bucket_than_gathered_is_refused() -> None:
    step = planned()
    start = next(s for s in step.nodes(Role.REDUCE_SCATTER) if len(operands(s)) == 2)
    start.args = tuple(reversed(operands(start)))
    with pytest.raises(errors.GradientReduceError, match="has other members than the all_gather"):
        verify_graph(step)


def test_word_of_the_schedule_cannot_be_called() -> None:
    with pytest.raises(RuntimeError, match="word of the schedule"):
        ops.all_gather()
    assert operator.getitem is not ops.wait
