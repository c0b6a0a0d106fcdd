"""FXZERO_CHECK: passes that keep numbers are let through, the first that does not is named with the first value."""

import contextlib
import copy
import functools
import logging
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxzero
from fxzero.errors import PassChangedNumbersError
from fxzero.graph import ops
from fxzero.graph.nodes import Role, gathered_params, grad_fqn, grad_of, is_gather, operands, release_of
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import Pass, StepGraph, copy_of
from fxzero.graph.verify import verify_plan
from fxzero.passes import (
    InsertAllGathers,
    InsertReduceScatters,
    NarrowAllGathers,
    NarrowReduceScatters,
    default_passes,
)
from fxzero.planner import plan
from fxzero.planning.check_passes import CheckPasses
from fxzero.planning.run_passes import run_passes
from tests.distributed.replicated import CASES
from tests.helpers.captured import trace
from tests.helpers.pairs import Net, assert_same, both, pair, points, sgd
from tests.helpers.random_net import WIDTH, RandomNet, random_net

aten = torch.ops.aten
SIZES: dict[str, Any] = {"bucket_bytes": 8192, "prefetch_bytes": 16384, "reduce_bytes": 16384}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> None:
    """FXZERO_CHECK=1."""
    monkeypatch.setenv("FXZERO_CHECK", "1")


@functools.cache
def captured(name: str) -> tuple[nn.Module, dict[str, Tensor], StepGraph]:
    """A model with its batch and its step, traced once."""
    torch.manual_seed(0)
    model, batch = CASES[name].build(), CASES[name].batch(1, 16)
    return model, batch, trace(model, **batch).step


def run_checked(
    model: nn.Module,
    batch: dict[str, Tensor],
    passes: Sequence[Pass],
    world_size: int = 4,
    synchronize: bool = True,
    step: StepGraph | None = None,
) -> StepGraph:
    """The step after all passes, each of which was checked."""
    step = trace(model, **batch).step if step is None else copy_of(step)
    step.sharding, step.synchronize = Sharding.over(world_size), synchronize
    run_passes(step, passes, observers=[CheckPasses(passes, model, list(batch.values()))])
    verify_plan(step)
    return step


# -- passes that are right -------------------------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "full recomputation": {"recompute": "full"},
    "least saved": {"recompute": 0},
    "all kept": {"max_kept_bytes": None},
    "one parameter a bucket": {"bucket_bytes": 1},
}


@pytest.mark.parametrize(
    ("name", "world_size", "how"),
    [
        *((name, world_size, how) for name, world_size in (("mlp", 1), ("gpt", 4)) for how in OPTIONS),
        *(
            pytest.param(name, world_size, how, marks=pytest.mark.exhaustive)
            for name, world_size in (("mlp", 4), ("gpt", 1), ("roberta", 4))
            for how in OPTIONS
        ),
    ],
)
def test_default_passes_keep_the_numbers_of_a_model(name: str, world_size: int, how: str) -> None:
    options, (model, batch, step) = OPTIONS[how], captured(name)
    step = run_checked(model, batch, default_passes(**SIZES | options), world_size, step=step)
    assert bool(step.kept) == (options == {"max_kept_bytes": None})


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_default_passes_keep_the_numbers_of_a_step_under_no_sync(name: str, world_size: int) -> None:
    model, batch, step = captured(name)
    step = run_checked(model, batch, default_passes(**SIZES), world_size, synchronize=False, step=step)
    assert not step.nodes(Role.REDUCE_SCATTER)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize("gather_dtype", [torch.bfloat16, torch.int8])
def test_narrow_types_change_numbers_within_their_tolerance(name: str, gather_dtype: torch.dtype) -> None:
    passes = default_passes(**SIZES, gather_dtype=gather_dtype, reduce_dtype=torch.bfloat16)
    model, batch, step = captured(name)
    run_checked(model, batch, passes, step=step)


def test_forward_alone_keeps_its_numbers() -> None:
    with torch.no_grad():
        step = run_checked(CASES["gpt"].build(), CASES["gpt"].batch(1, 16), default_passes(**SIZES))
    assert not step.has_backward


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_batch_norm_keep_their_numbers(training: bool) -> None:
    model = Net().train(training)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = points().requires_grad_()
    step = run_checked(model, {"x": x}, default_passes(bucket_bytes=200, recompute="full" if training else "none"))
    assert any(isinstance(grad, fx.Node) for grad in step.input_grads)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("seed", range(16))
def test_random_nets_keep_their_numbers(seed: int) -> None:
    torch.manual_seed(seed)
    model = RandomNet(random_net(seed))
    options: list[dict[str, Any]] = [{}, {"max_kept_bytes": None}, {"recompute": "full"}, {"max_kept_bytes": 512}]
    passes = default_passes(bucket_bytes=300, prefetch_bytes=500, reduce_bytes=500, **options[seed % 4])
    x = torch.randn(3, WIDTH)
    with torch.set_grad_enabled(model(x).requires_grad):
        run_checked(model, {"x": x}, passes, world_size=1 + seed % 4)


@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_nodes_that_share_shards_keep_their_numbers(layout: Any, check: None) -> None:
    case = CASES["gpt"]
    passes = (*default_passes(**SIZES), NarrowAllGathers())
    schedule = plan(
        case.build(), case.batch(1, 16), world_size=8, passes=passes, num_nodes=2, across="shard", layout=layout
    )
    assert "across" in str(schedule)


def test_a_model_without_values_is_checked_with_values_that_are_made_up(
    check: None, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        model, batch = CASES["roberta"].build(), dict.fromkeys(("input_ids", "labels"), torch.zeros(2, 16).long())
    with caplog.at_level(logging.INFO, "fxzero.planning.check_passes"):
        plan(model, batch, world_size=64)
    lines = [record.message for record in caplog.records if record.name == "fxzero.planning.check_passes"]
    assert len(lines) == 2  # gradients reduced, and kept unsharded under no_sync()
    assert all(re.fullmatch(r"FXZERO_CHECK: 13 passes checked in \d+\.\d\d s", line) for line in lines)


def test_values_that_are_nan_throughout_are_named(caplog: pytest.LogCaptureFixture) -> None:
    run_checked(Net(), {"x": torch.full((4, 6), float("nan"))}, default_passes())
    assert "FXZERO_CHECK: output 0 is NaN throughout on the example, which hides differences." in caplog.messages


# -- passes that are wrong -------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two square layers, a difference of two draws, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        """Returns a scalar."""
        hidden = torch.tanh(self.first(x)) * 0.5
        self.total.add_(hidden.detach().sum(0))  # type: ignore[operator]
        hidden = hidden - (torch.rand_like(hidden) - torch.rand_like(hidden))
        return self.second(hidden).square().mean()


def node_of(step: StepGraph, target: Any, number: int = 0) -> fx.Node:
    return step.graph.find_nodes(op="call_function", target=target)[number]


def swap_operands(step: StepGraph) -> None:
    sub = node_of(step, aten.sub.Tensor)
    sub.args = (sub.args[1], sub.args[0])


def drop_factor(step: StepGraph) -> None:
    mul = node_of(step, aten.mul.Tensor)
    mul.replace_all_uses_with(mul.args[0])
    step.graph.erase_node(mul)


def change_scalar(step: StepGraph) -> None:
    mul = node_of(step, aten.mul.Tensor)
    mul.args = (mul.args[0], 0.25)


def swap_slots(step: StepGraph) -> None:
    one, other = step.nodes(Role.WRITE_GRAD)
    one.args, other.args = (grad_of(one), grad_fqn(other)), (grad_of(other), grad_fqn(one))
    reductions = {grad_fqn(operands(start)[0]): start for start in step.nodes(Role.REDUCE_SCATTER)}
    grads = {fqn: next(iter(reductions[fqn].users)) for fqn in step.grads}
    step.set_output(step.model_outputs, grads, step.input_grads)


def reorder_draws(step: StepGraph) -> None:
    one, other = (node_of(step, aten.rand_like.default, number) for number in (0, 1))
    one.prepend(other)


def draw_once_more(step: StepGraph) -> None:
    draw = node_of(step, aten.rand_like.default)
    with step.graph.inserting_before(step.output):
        step.graph.node_copy(draw)


def forget_gradient(step: StepGraph) -> None:
    grads = dict(step.grads)
    del grads["second.weight"]
    step.set_output(step.model_outputs, grads, step.input_grads)


def drop_write_to_buffer(step: StepGraph) -> None:
    step.graph.erase_node(node_of(step, aten.copy_.default))


def read_after_release(step: StepGraph) -> None:
    """Read a parameter through a slice that the verifier does not take for a view of it."""
    wait = next(wait for wait in step.nodes(Role.WAIT) if is_gather(wait))
    (param,) = gathered_params(wait).values()
    release = release_of(wait)
    assert release is not None
    reader = next(user for user in param.users if user is not release)
    with step.graph.inserting_after(param):
        slice_ = step.graph.call_function(operator.getitem, (param, slice(None)))
    slice_.meta["val"] = param.meta["val"].clone()
    reader.replace_input_with(param, slice_)
    slice_.append(release)


def read_in_flight(step: StepGraph) -> None:
    start = node_of(step, ops.all_gather)
    (param,) = (user for user in next(iter(start.users)).users if user.target is operator.getitem)
    param.args = (start, 0)


def write_none(step: StepGraph) -> None:
    slot = step.nodes(Role.WRITE_GRAD)[0]
    slot.args = (None, grad_fqn(slot))


def subtract_text(step: StepGraph) -> None:
    sub = node_of(step, aten.sub.Tensor)
    sub.args = (sub.args[0], "text")


def nothing(step: StepGraph) -> None:
    """Changes nothing."""


def refused(wrong: Pass, place: int, model: nn.Module | None = None, **options: Any) -> str:
    """What the check says of a pass at some place in the default list, which the verifier lets through."""
    torch.manual_seed(0)
    model, batch = model or Small(), {"x": points()}
    passes = list(default_passes(bucket_bytes=1, **options))
    passes.insert(place, wrong)
    step = trace(model, **batch).step
    run_passes(step, passes)
    verify_plan(step)
    with pytest.raises(PassChangedNumbersError) as caught:
        run_checked(model, batch, passes)
    assert f"Pass {place + 1} of {len(passes)}, {getattr(wrong, '__name__', '')}" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("place", [0, 4, 13])
@pytest.mark.parametrize(
    ("wrong", "what", "node"),
    [
        (swap_operands, "output 0 differs in 1 of 1 elements; the first was 0.", "aten.sub.Tensor"),
        (drop_factor, "output 0 differs in 1 of 1 elements; the first was 0.", "aten.sum.dim_IntList|aten.sub.Tensor"),
        (change_scalar, "output 0 differs in 1 of 1 elements; the first was 0.", "aten.mul.Tensor"),
        (reorder_draws, "output 0 differs in 1 of 1 elements; the first was 0.", "aten.rand_like.default"),
        (draw_once_more, "random state of cpu differs in ", None),
        (drop_write_to_buffer, "buffer total differs in 6 of 6 elements; the first at [0] was ", None),
    ],
)
def test_wrong_pass_is_named_with_the_first_value_and_the_first_operator(
    wrong: Pass, what: str, node: str | None, place: int
) -> None:
    text = refused(wrong, place)
    assert f"changed numbers: {what}" in text
    found = re.search(r"The first node that was there before and has another value is 'compute.*' \((\S+), ", text)
    assert (found is not None and re.fullmatch(node, found[1]) is not None) if node else found is None, text


def test_gradient_in_the_slot_of_another_is_named() -> None:
    text = refused(swap_slots, 4)
    assert re.search(r"gradient of first\.weight differs in \d+ of 36 elements; the first at \[0, 0\] was ", text)
    assert "All nodes that were there before have the same values" in text


def test_gradient_that_is_not_written_is_named() -> None:
    assert "gradient of second.weight differs in 36 of 36 elements; the first at [0, 0]" in refused(write_none, 4)


def test_gradient_that_is_not_returned_is_named() -> None:
    assert "gradient of second.weight was float32 [6, 6] and is None." in refused(forget_gradient, 0)


def test_parameter_that_is_read_after_its_release_is_named() -> None:
    text = refused(read_after_release, 13)
    assert re.search(r"output 0 differs in 1 of 1 elements; the first was \S+ and is nan\.", text)
    assert "The first node that was there before and has another value is 'compute first' (aten." in text


def test_collective_that_is_read_in_flight_is_named_by_its_reader() -> None:
    text = refused(read_in_flight, 13)
    assert "left a graph that cannot be run: 'compute' (getitem, node getitem" in text


def test_first_of_several_wrong_passes_is_named() -> None:
    torch.manual_seed(0)
    passes = [nothing, change_scalar, *default_passes(), swap_operands]
    with pytest.raises(PassChangedNumbersError, match="Pass 2 of 16, change_scalar, changed numbers"):
        run_checked(Small(), {"x": points()}, passes)


@dataclass(frozen=True)
class ChangeScalar:
    """A pass that may change numbers by some part of the largest."""

    tolerance: float

    def __call__(self, step: StepGraph, /) -> None:
        mul = node_of(step, aten.mul.Tensor)
        mul.args = (mul.args[0], 0.51)


def test_pass_with_a_tolerance_may_change_as_much_and_no_more() -> None:
    torch.manual_seed(0)
    run_checked(Small(), {"x": points()}, [ChangeScalar(0.1), *default_passes()])
    assert re.search(r"differs in 1 of 1 elements by more than \S+; the first was", refused(ChangeScalar(1e-4), 0))


def test_tolerance_of_one_pass_is_none_of_the_next() -> None:
    torch.manual_seed(0)
    passes = [*default_passes(), NarrowReduceScatters(), NarrowAllGathers(), change_scalar]
    with pytest.raises(PassChangedNumbersError, match="Pass 16 of 16, change_scalar, changed numbers: output 0"):
        run_checked(Small(), {"x": points()}, passes)


def test_signed_zeros_differ_and_nan_equals_nan() -> None:
    class Zeros(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x / x, x * 0.0

    def negate(step: StepGraph) -> None:
        mul = node_of(step, aten.mul.Tensor)
        mul.args = (mul.args[0], -0.0)

    with pytest.raises(PassChangedNumbersError, match=r"output 1 differs in 2 of 2 .* at \[0\] was 0.0 and is -0.0"):
        run_checked(Zeros(), {"x": torch.tensor([0.0, 1.0])}, [nothing, negate])


@pytest.mark.parametrize("wrong", [change_scalar, subtract_text])
def test_generator_and_buffers_are_left_alone_also_after_an_error(wrong: Pass) -> None:
    model, batch = Small(), {"x": points()}
    before = torch.get_rng_state()
    with pytest.raises(PassChangedNumbersError):
        run_checked(model, batch, [wrong])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.total, torch.zeros(6))


def test_captured_graph_that_cannot_be_run_says_so() -> None:
    model = nn.Embedding(3, 2)
    with pytest.raises(RuntimeError, match=r"'compute' \(aten.embedding.default, node embedding\) raises IndexError"):
        run_checked(model, {"input": torch.tensor([5])}, [InsertAllGathers(), InsertReduceScatters()])


# -- the variable ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["2", "yes", "true"])
def test_other_values_of_the_variable_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_CHECK", value)
    with pytest.raises(ValueError, match=f"FXZERO_CHECK is '{value}'; it must be 1"):
        plan(Net(), points(), world_size=2)


@pytest.mark.parametrize("value", ["", "0", None])
def test_nothing_is_checked_without_the_variable(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXZERO_CHECK", raising=False)
    if value is not None:
        monkeypatch.setenv("FXZERO_CHECK", value)
    plan(Small(), points(), world_size=2, passes=[change_scalar, *default_passes()])


def test_what_a_wrong_pass_changed_is_dumped(tmp_path: Path, check: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_DUMP", str(tmp_path))
    with pytest.raises(PassChangedNumbersError):
        plan(Small(), points(), world_size=2, passes=[drop_factor, *default_passes()])
    assert (tmp_path / "01_drop_factor.diff").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_trains_as_eager_under_the_check(
    dtype: torch.dtype, check: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Every kind of plan is checked: two shapes, with and without no_sync(), evaluation."""
    caplog.set_level(logging.INFO, "fxzero.planning.check_passes")
    torch.manual_seed(0)
    zero, plain = pair(Net().to(dtype))
    optimizers = sgd(zero), sgd(plain)
    for step, batch in enumerate((4, 4, 3)):
        for micro in (0, 1):
            x = points(2 * step + micro, batch).to(dtype)
            states: list[Tensor] = []
            for model in (zero, plain):
                torch.manual_seed(step)
                with zero.no_sync() if micro == 0 else contextlib.nullcontext():
                    model(x).loss.backward()
                states.append(torch.get_rng_state())
            assert torch.equal(*states), "the check left another random state"
        assert_same(zero, plain)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same(zero, plain)
    zero.eval()
    plain.eval()
    with torch.no_grad():
        own, other = both(zero, plain, points().to(dtype))
    assert torch.equal(own.logits, other.logits)
    assert sum("13 passes checked" in message for message in caplog.messages) == 5


def test_compile_names_a_wrong_pass(check: None) -> None:
    passes = [*default_passes(), drop_factor]
    with pytest.raises(PassChangedNumbersError, match="Pass 14 of 14, drop_factor, changed numbers: output 0"):
        fxzero.compile(Small(), passes=passes)(points())
