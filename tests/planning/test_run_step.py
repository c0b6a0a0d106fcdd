"""What the words of the schedule do where a step is run on one rank, by hand and against ranks that communicate."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.graph.nodes import Role, set_wire_format, wait_of
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import WireFormat
from fxzero.passes import default_passes
from fxzero.planning.example_values import example_values
from fxzero.planning.run_passes import run_passes
from fxzero.planning.run_step import copy_of_tensor, run_step
from fxzero.testing import engine_of, run_ranks
from tests.distributed.replicated import CASES, own_slice
from tests.helpers.toy_step import toy_step


def toy_values(step: StepGraph) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    placeholders = step.graph.find_nodes(op="placeholder")
    return {node.name: torch.randn(node.meta["val"].shape, generator=generator) for node in placeholders}


def planned_toy(**options: Any) -> StepGraph:
    step = toy_step(world_size=4)
    run_passes(step, default_passes(bucket_bytes=1, **options))
    return step


def watched(step: StepGraph, values: dict[str, Tensor]) -> dict[str, Any]:
    """What each node gives, as it is at the end of the step."""
    seen: dict[str, Any] = {}
    run_step(step, values, lambda node, value: seen.update({node.name: value}))
    return seen


def test_planned_step_gives_what_the_captured_one_does() -> None:
    captured, planned = toy_step(), planned_toy()
    before, after = (run_step(step, toy_values(step)) for step in (captured, planned))
    assert torch.equal(before["output"]["0"], after["output"]["0"])
    assert before["gradient of"].keys() == after["gradient of"].keys() == captured.grads.keys()
    assert all(torch.equal(grad, after["gradient of"][fqn]) for fqn, grad in before["gradient of"].items())


def test_what_was_released_is_nan_and_so_is_what_was_reduced() -> None:
    step = planned_toy()
    seen = watched(step, toy_values(step))
    for node in step.nodes(Role.ALL_GATHER):
        assert all(param.isnan().all() for param in seen[wait_of(node).name])
    for node in step.nodes(Role.WRITE_GRAD):
        assert seen[node.name].isnan().all()


def test_a_kept_bucket_is_there_until_it_is_released() -> None:
    step = planned_toy(max_kept_bytes=None)
    assert len(step.nodes(Role.ALL_GATHER)) == 3
    assert all(grad.isfinite().all() for grad in run_step(step, toy_values(step))["gradient of"].values())


def test_parameters_and_other_values_that_are_fed_stay_as_they_are() -> None:
    step = planned_toy()
    values = toy_values(step)
    before = copy.deepcopy(values)
    run_step(step, values)
    assert all(torch.equal(value, before[name]) for name, value in values.items())


def test_gathered_parameters_are_rounded_as_they_travel() -> None:
    step = planned_toy()
    starts = step.nodes(Role.ALL_GATHER)
    set_wire_format(starts[0], WireFormat(torch.bfloat16))
    set_wire_format(starts[1], WireFormat(torch.int8, 256))
    values, gathered = toy_values(step), {}
    names = {wait_of(start).name: index for index, start in enumerate(starts[:3])}

    def keep(node: torch.fx.Node, value: Any) -> None:
        if node.name in names:
            gathered[names[node.name]] = value[0].clone()

    run_step(step, values, keep)
    first, second, third = (values[f"w{index}"] for index in range(3))
    assert torch.equal(gathered[0], first.bfloat16().float())
    scale = second.flatten().view(-1, 256).abs().amax(1, keepdim=True) / 127
    assert torch.equal(gathered[1], ((second.flatten().view(-1, 256) / scale).round() * scale).view(second.shape))
    assert torch.equal(gathered[2], third)


def test_operator_that_fails_is_named() -> None:
    step = toy_step()
    values = toy_values(step)
    values["w1"] = torch.zeros(2, 2)
    with pytest.raises(
        RuntimeError, match=r"'compute layers.1' \(aten.mm.default, node mm_default_1\) raises RuntimeError"
    ):
        run_step(step, values)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(3.0).expand(2, 3),
        torch.arange(12.0)[2:10:3],
        torch.empty(0, 3),
        torch.tensor(2.0),
    ],
)
def test_copy_of_a_tensor_has_its_values_and_strides_and_other_memory(tensor: Tensor) -> None:
    copied = copy_of_tensor(tensor)
    assert torch.equal(copied, tensor) and copied.stride() == tensor.stride()
    assert copied.numel() == 0 or copied.data_ptr() != tensor.data_ptr()


def compare_with_ranks(rank: int, world_size: int, name: str, options: dict[str, Any], across: bool) -> None:
    """Worker: train a step, all ranks on one batch, and run its plan with the full parameters."""
    torch.manual_seed(0)
    model, batch = CASES[name].build(), CASES[name].batch(1, 16)
    full = copy.deepcopy(model)
    kwargs: dict[str, Any] = {"mesh": init_device_mesh("cpu", (2, 2)), "across": "shard"} if across else {}
    zero = fxzero.compile(model, passes=default_passes(bucket_bytes=8192, **options), **kwargs)
    torch.manual_seed(1)
    loss = zero(**batch)
    loss = loss if isinstance(loss, Tensor) else loss.loss
    loss.backward()
    step = engine_of(zero).last.step
    values = example_values(step, full, list(batch.values()))
    values |= {node.name: torch.ones(()) for node in step.nodes(Role.TANGENT)}
    torch.manual_seed(1)
    results = run_step(step, values)
    assert torch.equal(loss.detach(), results["output"]["0"])
    assert results["gradient of"].keys() == {fqn for fqn, param in zero.named_parameters() if param.grad is not None}
    for fqn, param in zero.named_parameters():
        if param.grad is not None:
            assert torch.equal(param.grad, own_slice(zero, fqn, results["gradient of"][fqn])), fqn


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gather_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16},
        {"gather_dtype": torch.int8, "max_kept_bytes": None},
    ],
)
def test_one_rank_computes_what_two_that_communicate_do(name: str, options: dict[str, Any]) -> None:
    run_ranks(2, compare_with_ranks, name, options, False)


def test_one_rank_computes_what_nodes_that_share_shards_do() -> None:
    run_ranks(4, compare_with_ranks, "gpt", {"gather_dtype": torch.int8}, True)
