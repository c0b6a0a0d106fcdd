"""One hand-broken graph per rule."""

import operator
from dataclasses import replace

import pytest
import torch
from torch import fx

from fxzero import errors
from fxzero.graph import ops
from fxzero.graph.nodes import Role, gathered_params, grad_of, operands, release_of, set_wire_format, slot_fqn, wait_of
from fxzero.graph.step import StepGraph
from fxzero.graph.verify import verify_graph, verify_plan
from fxzero.graph.wire import WireFormat
from fxzero.passes import (
    InsertAllGathers,
    InsertReduceScatters,
    KeepGathered,
    ReleaseParams,
    RematerializeViews,
    default_passes,
)
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step

aten = torch.ops.aten


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


def test_what_is_gathered_is_not_read_before_its_wait() -> None:
    step = planned()
    wait = wait_of(step.nodes(Role.ALL_GATHER)[0])
    output = next(iter(gathered_params(wait).values()))
    wait.prepend(output)
    wait.prepend(next(iter(output.users)))
    with pytest.raises(errors.MalformedGraphError, match=r"stands before 'wait layers\.0\.w \+1', which it reads"):
        verify_graph(step)


def test_read_after_release_is_refused_through_what_is_no_view_but_has_the_memory() -> None:
    step = planned()
    wait = wait_of(step.nodes(Role.ALL_GATHER)[0])
    release = release_of(wait)
    assert release is not None
    reshaped = _insert(step, wait.next.next, aten._unsafe_view.default, gathered_params(wait)["layers.0.w"], [-1])
    _insert(step, release.next, aten.relu.default, reshaped)
    with pytest.raises(errors.UseAfterReleaseError, match=r"layers\.0\.w is read by 'compute' after its release"):
        verify_graph(step)
    step.graph.erase_node(release)
    ReleaseParams()(step)
    verify_plan(step)


def _insert(step: StepGraph, before: fx.Node, *call: object) -> fx.Node:
    """A new call of an operator in front of a node."""
    target, *args = call
    with step.graph.inserting_before(before):
        return step.graph.call_function(target, tuple(args))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("through_view", [False, True])
def test_write_into_a_gathered_param_is_refused(through_view: bool) -> None:
    step = planned()
    param = gathered_params(wait_of(step.nodes(Role.ALL_GATHER)[0]))["layers.0.w"]
    target = next(iter(param.users)) if through_view else param
    _insert(step, target.next, aten.zero_.default, target)
    with pytest.raises(errors.ParameterWriteError, match=r"'compute' writes into layers\.0\.w, of which other ranks"):
        verify_graph(step)


def test_write_into_a_shard_is_refused() -> None:
    step = toy_step()
    assert step.end_forward is not None
    row = _insert(step, step.end_forward, aten.select.int, step.param_nodes()["layers.1.w"], 0, 3)
    _insert(step, step.end_forward, aten.zero_.default, row)
    with pytest.raises(errors.ParameterWriteError, match=r"'compute' writes into layers\.1\.w"):
        verify_graph(step)


@pytest.mark.parametrize("after_start", [False, True])
def test_write_to_a_gradient_that_a_reduction_reads_is_refused(after_start: bool) -> None:
    step = planned()
    start = step.nodes(Role.REDUCE_SCATTER)[0]
    slot = operands(start)[0]
    (memory,) = (node for node in step.nodes(Role.GRAD_SLOT) if slot_fqn(node) == slot.args[1])
    row = _insert(step, slot, aten.select.int, memory, 0, 3)
    zero = _insert(step, slot, aten.zero_.default, row)
    verify_plan(step)
    (start if after_start else slot).append(zero)
    with pytest.raises(errors.GradientMemoryError, match="'compute' uses the memory of the gradient of layers.* after"):
        verify_graph(step)


def test_read_of_a_gradient_that_a_reduction_may_change_is_refused() -> None:
    step = planned()
    start = step.nodes(Role.REDUCE_SCATTER)[0]
    written = grad_of(operands(start)[0])
    _insert(step, start.next, aten.relu.default, written)
    with pytest.raises(errors.GradientMemoryError, match="after its write_grad, when its reduce may be reading it"):
        verify_graph(step)


def test_gradient_computed_in_the_slot_of_another_is_refused() -> None:
    step = planned()
    one, other = step.nodes(Role.WRITE_GRAD)[-2:]
    other.args = (grad_of(one), other.args[1])
    with pytest.raises(errors.GradientMemoryError, match="takes what was not computed in its own slot"):
        verify_graph(step)


def test_slot_that_its_write_grad_does_not_take_is_refused() -> None:
    step = planned()
    slot = step.nodes(Role.WRITE_GRAD)[0]
    slot.args = (_insert(step, slot, aten.clone.default, grad_of(slot)), slot.args[1])
    with pytest.raises(errors.GradientMemoryError, match=r"A grad_slot has the memory of the gradient of layers\.2\.w"):
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
    run_passes(step, [RematerializeViews(), InsertAllGathers(), ReleaseParams()])
    with pytest.raises(errors.GradientReduceError, match="never reduced"):
        verify_plan(step)


def test_gradient_never_reduced_is_refused_where_every_bucket_stays_gathered() -> None:
    step = toy_step(num_layers=1)
    stay = KeepGathered(buckets=(("layers.0.w",),), resident=(("layers.0.w",),))
    run_passes(step, [RematerializeViews(), InsertAllGathers(), stay, ReleaseParams()])
    with pytest.raises(errors.GradientReduceError, match="never reduced"):
        verify_plan(step)


def test_gradient_that_is_not_written_under_no_sync_is_refused_in_a_plan() -> None:
    step = toy_step()
    step.synchronize = False
    run_passes(step, [RematerializeViews(), InsertAllGathers(), ReleaseParams()])
    with pytest.raises(errors.GradientReduceError, match="never written to its slot"):
        verify_plan(step)


def test_parameter_that_nothing_gathers_is_refused_in_a_plan() -> None:
    step = toy_step()
    run_passes(step, [InsertReduceScatters()])
    with pytest.raises(errors.ReadWithoutGatherError, match=r"layers\.0\.w is read by .* Run InsertAllGathers"):
        verify_plan(step)


def test_plan_without_any_release_is_complete() -> None:
    step = toy_step()
    run_passes(step, default_passes()[:4])
    verify_plan(step)


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


@pytest.mark.parametrize(
    "which, format, world_size, why",
    [
        (Role.ALL_GATHER, WireFormat(torch.bfloat16), 1, "a rank that is alone has no wire"),
        (Role.ALL_GATHER, WireFormat(torch.int8), 8, "others quantised in blocks"),
        (Role.ALL_GATHER, WireFormat(torch.bfloat16, 256), 8, "floating types are cast"),
        (Role.REDUCE_SCATTER, WireFormat(torch.int8, 256), 8, "sums need a floating type"),
        (Role.REDUCE_SCATTER, WireFormat(torch.float32), 8, "that takes no fewer bytes than torch.float32"),
    ],
)
def test_wire_format_that_does_not_fit_is_refused(which: Role, format: WireFormat, world_size: int, why: str) -> None:
    step = toy_step(world_size=world_size)
    run_passes(step, default_passes(bucket_bytes=2**15))
    set_wire_format(step.nodes(which)[0], format)
    with pytest.raises(errors.WireFormatError, match=f"travels as {format}, but .*{why}"):
        verify_graph(step)


def test_wire_format_of_what_is_not_floating_is_refused() -> None:
    step = planned()
    step.params = {fqn: replace(param, dtype=torch.int64) for fqn, param in step.params.items()}
    step._buckets.clear()
    set_wire_format(step.nodes(Role.ALL_GATHER)[0], WireFormat(torch.bfloat16))
    with pytest.raises(errors.WireFormatError, match="its bucket is of torch.int64, which is not floating"):
        verify_graph(step)
