"""Which optimizers are let through, that cutting changes no bit of what they compute, and the check before a step."""

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from fxzero.errors import OptimizerError
from fxzero.graph.layout import ParamSpec, Slice
from fxzero.optimizers.classes import ELEMENTWISE, REFUSED, WHOLE, check_optimizer
from fxzero.optimizers.guard import OptimizerGuard
from fxzero.optimizers.state import ParamShard, cut_state

CPU = torch.device("cpu")
SHAPES = {"w": (37, 29), "scalar": (), "one": (1,), "b": (5,)}
CUTS = {"w": (0, 1, 400, 400, 1001, 1073), "scalar": (0, 0, 1), "one": (0, 1, 1), "b": (0, 3, 5)}
"""The edges of the shards of each parameter: odd, unaligned, some empty."""


class Squared(optim.SGD):
    """Some class that fxzero does not know, which looks at all elements of a gradient."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad /= param.grad.square().mean()
        return super().step(closure)


def full_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def spec_of(name: str, param: Tensor) -> ParamSpec:
    return ParamSpec(name, tuple(param.shape), param.dtype, param.requires_grad)


def shard_of(name: str, param: Tensor, index: int) -> ParamShard:
    start, stop = CUTS[name][index : index + 2]
    return ParamShard(spec_of(name, param), Slice(start, stop, 0), CPU)


def shards_of(params: dict[str, nn.Parameter], index: int) -> dict[int, ParamShard]:
    """The shards with this index, of the parameters that have so many."""
    return {id(p): shard_of(name, p, index) for name, p in params.items() if index + 1 < len(CUTS[name])}


def sliced(full: Tensor, part: Slice) -> Tensor:
    return full.reshape(-1)[part.start : part.stop].reshape(-1, *(1 for _ in full.shape[1:])).clone()


def step_with(
    optimizer: optim.Optimizer, params: dict[str, nn.Parameter], cut: dict[int, ParamShard], step: int
) -> None:
    for name, grad in gradients(step).items():
        param = params[name]
        part = cut[id(param)].part if id(param) in cut else Slice(0, 0, 0)
        param.grad = grad if not cut else sliced(grad, part)
    optimizer.step()


def become_shards(params: dict[str, nn.Parameter], cut: dict[int, ParamShard]) -> None:
    for param in params.values():
        part = cut[id(param)].part if id(param) in cut else Slice(0, 0, 0)
        param.grad = None
        param.data = sliced(param.detach(), part)


def variant(cls: Any, **options: Any) -> Callable[[list[nn.Parameter]], optim.Optimizer]:
    return lambda params: cls(params, **options)


VARIANTS = {
    **{f"{cls.__name__}-for-loop": variant(cls, foreach=False, lr=0.05) for cls in ELEMENTWISE},
    **{f"{cls.__name__}-foreach": variant(cls, foreach=True, lr=0.05) for cls in ELEMENTWISE},
    "Adam-fused": variant(optim.Adam, fused=True, amsgrad=True),
    "AdamW-fused": variant(optim.AdamW, fused=True),
    "Adagrad-fused": variant(optim.Adagrad, fused=True),
    "SGD-fused": variant(optim.SGD, fused=True, lr=0.1, momentum=0.9),
    "AdamW-tensor-lr": variant(optim.AdamW, lr=torch.tensor(0.05)),
    "SGD-nesterov": variant(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop-centered": variant(optim.RMSprop, centered=True, momentum=0.9),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_update_equals_that_of_full_parameters_when_cut(name: str, steps_before: int):
    full = full_parameters()
    expected = VARIANTS[name](list(full.values()))
    for step in range(5):
        step_with(expected, full, {}, step)

    got: dict[str, list[Tensor]] = {key: [] for key in SHAPES}
    for index in range(max(map(len, CUTS.values())) - 1):
        params = full_parameters()
        optimizer = VARIANTS[name](list(params.values()))
        for step in range(steps_before):
            step_with(optimizer, params, {}, step)
        cut = shards_of(params, index)
        cut_state(optimizer, cut)
        for param in params.values():  # those without a shard of this index leave the optimizer
            if id(param) not in cut:
                optimizer.state.pop(param, None)
        optimizer.param_groups[0]["params"] = [p for p in params.values() if id(p) in cut]
        become_shards(params, cut)
        for step in range(steps_before, 5):
            step_with(optimizer, params, cut, step)
        for key, param in params.items():
            got[key].append(param.detach())
    for key, param in full.items():
        if name == "SGD-fused":  # its vector kernel rounds otherwise than its scalar one
            torch.testing.assert_close(torch.cat(got[key]).flatten(), param.detach().reshape(-1), rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(torch.cat(got[key]).flatten(), param.detach().reshape(-1)), key


@pytest.mark.parametrize("cls", ELEMENTWISE)
def test_elementwise_class_passes(cls: Any):
    check_optimizer(cls([nn.Parameter(torch.ones(2))]), elementwise_optimizer=False)


def test_every_class_of_torch_optim_is_decided():
    classes = {cls for cls in vars(optim).values() if isinstance(cls, type) and issubclass(cls, optim.Optimizer)}
    assert classes - {optim.Optimizer} == {*ELEMENTWISE, *REFUSED, *WHOLE}


@pytest.mark.parametrize("cls", REFUSED)
def test_class_is_refused_by_name_when_it_is_not_elementwise(cls: Any):
    optimizer = cls([nn.Parameter(torch.ones(2, 2))])
    for vouched in (False, True):
        with pytest.raises(OptimizerError, match=f"{cls.__name__} cannot step shards: .*AdamW"):
            check_optimizer(optimizer, elementwise_optimizer=vouched)


def test_other_class_is_refused_unless_the_user_vouches():
    optimizer = Squared([nn.Parameter(torch.ones(2))])
    with pytest.raises(
        OptimizerError, match=r"test_optimizer_guard\.Squared is not known to be element-wise.*elementwise_optimizer="
    ):
        check_optimizer(optimizer, elementwise_optimizer=False)
    check_optimizer(optimizer, elementwise_optimizer=True)


def test_object_is_refused_when_it_is_no_optimizer():
    with pytest.raises(OptimizerError, match=r"not a torch\.optim.Optimizer"):
        check_optimizer("adam", elementwise_optimizer=True)


# -- cut_state ---------------------------------------------------------------------------------------------------


def test_full_state_is_freed_when_cut():
    param = nn.Parameter(torch.randn(8, 4))
    optimizer = optim.AdamW([param])
    param.grad = torch.ones(8, 4)
    optimizer.step()
    step, moment = optimizer.state[param]["step"], optimizer.state[param]["exp_avg"].reshape(-1, 1)[3:9].clone()
    cut_state(optimizer, {id(param): ParamShard(spec_of("w", param), Slice(3, 9, 0), CPU)})
    state = optimizer.state[param]
    assert state["step"] is step
    assert torch.equal(state["exp_avg"], moment)
    assert {value.untyped_storage().nbytes() for key, value in state.items() if key != "step"} == {6 * 4}


def test_state_is_made_for_the_shard_when_adagrad_saw_a_meta_model():
    with torch.device("meta"):
        param = nn.Parameter(torch.empty(8, 4))
        optimizer = optim.Adagrad([param], initial_accumulator_value=0.5)
    cut_state(optimizer, {id(param): ParamShard(spec_of("w", param), Slice(3, 9, 0), CPU)})
    assert torch.equal(optimizer.state[param]["sum"], torch.full((6, 1), 0.5))
    assert torch.equal(optimizer.state[param]["step"], torch.zeros(()))


def test_nothing_is_cut_when_there_is_no_state_or_the_parameter_is_not_ours():
    param, other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    optimizer = optim.Adagrad([param, other])
    optimizer.state.pop(param)
    cut_state(optimizer, {id(param): ParamShard(spec_of("w", param), Slice(0, 2, 0), CPU)})
    assert list(optimizer.state) == [other]
    assert optimizer.state[other]["sum"].shape == (4,)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            torch.ones(4),
            r"State 'odd' of w in AdamW is torch.float32 \(4,\); only tensors of the parameter's shape \(8, 4\)",
        ),
        ([torch.ones(4)], "State 'odd' of w in AdamW is a list of tensors"),
        (torch.ones(8, 4, device="meta"), "State 'odd' of w in AdamW is on the meta device"),
    ],
)
def test_state_is_refused_and_nothing_cut_when_it_is_not_elementwise(value: object, text: str):
    param = nn.Parameter(torch.randn(8, 4))
    optimizer = optim.AdamW([param])
    optimizer.state[param] = {"exp_avg": torch.ones(8, 4), "odd": value}
    with pytest.raises(OptimizerError, match=text):
        cut_state(optimizer, {id(param): ParamShard(spec_of("w", param), Slice(3, 9, 0), CPU)})
    assert optimizer.state[param]["exp_avg"].shape == (8, 4)


# -- the guard ---------------------------------------------------------------------------------------------------


class Sharded(nn.Module):
    """A model of one parameter, 8 x 4, of which this rank has elements 3 to 9."""

    guard: OptimizerGuard

    def __init__(self) -> None:
        super().__init__()
        self.itself = [self]  # a cycle, as real models have them
        self.w = nn.Parameter(torch.randn(8, 4))
        self.shards = {id(self.w): ParamShard(spec_of("w", self.w), Slice(3, 9, 0), CPU)}
        self.sharded: list[bool] = []
        shards, sharded = self.shards, self.sharded
        self.held = lambda: shards if sharded else {}

    def shard(self) -> None:
        self.sharded.append(True)
        self.w.data = self.w.detach().reshape(-1, 1)[3:9].clone()


@pytest.fixture
def model() -> Sharded:
    model = Sharded()
    model.guard = OptimizerGuard(model, model.held, elementwise_optimizer=False)
    return model


def step(optimizer: optim.Optimizer, param: Tensor) -> None:
    param.grad = torch.ones_like(param)
    optimizer.step()


def test_guard_lets_an_optimizer_through_that_was_built_after_sharding(model: Sharded):
    model.shard()
    classes: tuple[Any, ...] = ELEMENTWISE
    for cls in classes:
        optimizer = cls([model.w])
        step(optimizer, model.w)
        model.guard.check(optimizer, model.shards)  # its state has the shards' shape now
        step(optimizer, model.w)


def test_guard_refuses_full_state_when_the_optimizer_was_not_passed_to_compile(model: Sharded):
    optimizer = optim.AdamW([model.w])
    step(optimizer, model.w)
    model.w.grad = None
    model.shard()
    model.guard = OptimizerGuard(model, model.held, elementwise_optimizer=False)
    for _ in range(2):  # and each time again
        with pytest.raises(OptimizerError, match=r"'exp_avg' of w .*compile\(model, optimizer=optimizer\)"):
            step(optimizer, model.w)
    cut_state(optimizer, model.shards)
    step(optimizer, model.w)


def test_guard_checks_the_class_and_the_groups_of_later_optimizers(model: Sharded):
    model.shard()
    with pytest.raises(OptimizerError, match="not known to be element-wise"):
        step(Squared([model.w]), model.w)
    OptimizerGuard(model, model.held, elementwise_optimizer=True)  # replaces the first
    step(Squared([model.w]), model.w)
    with pytest.warns(UserWarning, match="duplicate"):
        twice = optim.SGD([model.w, model.w])
    with pytest.raises(OptimizerError, match="has w twice"):
        step(twice, model.w)


def test_guard_looks_again_when_a_group_is_added(model: Sharded):
    other = nn.Parameter(torch.ones(2))
    optimizer = Squared([other])
    model.shard()
    step(optimizer, other)
    optimizer.add_param_group({"params": [model.w]})
    with pytest.raises(OptimizerError, match="Squared"):
        step(optimizer, other)


def test_guard_looks_again_when_the_shards_are_there(model: Sharded):
    optimizer = optim.AdamW([model.w])
    step(optimizer, model.w)  # before the first call of a lazily compiled model
    model.w.grad = None
    model.shard()
    with pytest.raises(OptimizerError, match="'exp_avg' of w"):
        step(optimizer, model.w)


def test_guard_ignores_optimizers_without_its_parameters(model: Sharded):
    model.shard()
    other = nn.Parameter(torch.ones(2, 2))
    step(optim.Muon([other]), other)
    step(Squared([other]), other)


def test_guard_ends_with_its_owner():
    model = Sharded()
    model.shard()
    OptimizerGuard(model, model.held, elementwise_optimizer=False)
    param = model.w
    optimizer = Squared([param])
    with pytest.raises(OptimizerError):
        step(optimizer, param)
    del model
    gc.collect()
    step(optimizer, param)


def test_cuts_of_the_tests_cover_their_parameters():
    assert {name: edges[-1] for name, edges in CUTS.items()} == {n: math.prod(shape) for n, shape in SHAPES.items()}
