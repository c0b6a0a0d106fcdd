"""Optimizers built before, between and after compile and the first call step shards as they step parameters."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import fxzero
from fxzero.errors import OptimizerError
from tests.helpers.pairs import Net, assert_same, both, pair, points

Make = Callable[[Any], torch.optim.Optimizer]


def adamw(params: Any) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.01, weight_decay=0.1)


def train(
    zero: nn.Module, plain: nn.Module, own: Any, other: Any, seeds: range = range(3), schedulers: Any = ()
) -> None:
    """Steps of both, compared after each."""
    for seed in seeds:
        for output in both(zero, plain, points(seed), seed=seed):
            output.loss.backward()
        for optimizer in (own, other):
            optimizer.step()
        assert_same(zero, plain)
        for optimizer in (own, other):
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices only, another rate for the rest."""
    params = list(module.named_parameters())
    decayed = [param for name, param in params if name.endswith("weight") and "norm" not in name]
    rest = [param for name, param in params if not name.endswith("weight") or "norm" in name]
    return [{"params": decayed, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0, "lr": 0.03}]


@pytest.mark.parametrize("when", ["before, passed", "before", "lazy", "example", "after a call"])
def test_an_optimizer_may_be_built_at_any_time(when: str) -> None:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    own = adamw(groups(model)) if when.startswith("before") else None
    options: dict[str, Any] = {"optimizer": own} if when == "before, passed" else {}
    if when == "example":
        options["example"] = points()
    zero = fxzero.compile(model, **options)
    if when == "after a call":
        both(zero, plain, points())
    train(zero, plain, own or adamw(groups(zero)), adamw(groups(plain)))


@pytest.mark.parametrize("make", [adamw, lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adagrad(p)])
def test_an_optimizer_that_stepped_before_compile_goes_on(make: Make) -> None:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    own, other = make(model.parameters()), make(plain.parameters())
    for module, optimizer in ((model, own), (plain, other)):
        torch.manual_seed(0)
        for seed in range(2):
            module(points(seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    zero = fxzero.compile(model, optimizer=own)
    train(zero, plain, own, other)


def test_an_optimizer_that_stepped_before_and_was_not_passed_is_refused() -> None:
    torch.manual_seed(0)
    model = Net()
    own = adamw(model.parameters())
    model(points()).loss.backward()
    own.step()
    own.zero_grad()
    zero = fxzero.compile(model)
    zero(points()).loss.backward()
    with pytest.raises(OptimizerError, match=r"has state for the full parameter.*fxzero.compile\(model, optimizer="):
        own.step()


def test_steps_between_compile_and_the_first_call_are_those_of_the_full_parameters() -> None:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    own, other = adamw(model.parameters()), adamw(plain.parameters())
    zero = fxzero.compile(model, optimizer=own)
    for module, optimizer in ((zero, own), (plain, other)):
        for param in module.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()
    train(zero, plain, own, other)


def test_schedulers_and_hooks_of_an_optimizer_live_on() -> None:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    optimizers = [adamw(module.parameters()) for module in (model, plain)]
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4) for optimizer in optimizers]
    seen: list[str] = []
    optimizers[0].register_step_pre_hook(lambda *_: seen.append("before"))
    optimizers[0].register_step_post_hook(lambda *_: seen.append("after"))
    zero = fxzero.compile(model, optimizer=optimizers[0])
    train(zero, plain, *optimizers, schedulers=schedulers)
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr() != [0.01]
    assert seen == ["before", "after"] * 3


def test_several_optimizers_each_with_some_parameters() -> None:
    zero, plain = pair()

    def make(module: Any) -> list[torch.optim.Optimizer]:
        return [SGD(module.body.parameters(), lr=0.1, momentum=0.5), adamw(module.head.parameters())]

    own, other = make(zero), make(plain)
    for seed in range(3):
        for output in both(zero, plain, points(seed), seed=seed):
            output.loss.backward()
        for optimizer in own + other:
            optimizer.step()
        for module in (zero, plain):
            module.zero_grad()
        assert_same(zero, plain)


def test_several_optimizers_are_passed_in_a_list() -> None:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    own = [SGD(model.body.parameters(), lr=0.1), adamw(model.head.parameters())]
    zero = fxzero.compile(model, optimizer=own, example=points())
    other = [SGD(plain.body.parameters(), lr=0.1), adamw(plain.head.parameters())]
    for output in both(zero, plain, points()):
        output.loss.backward()
    for optimizer in own + other:
        optimizer.step()
    assert_same(zero, plain)


def test_the_state_of_an_optimizer_is_saved_and_loaded_as_shards() -> None:
    zero, plain = pair()
    own, other = adamw(groups(zero)), adamw(groups(plain))
    train(zero, plain, own, other)
    saved = copy.deepcopy(own.state_dict())
    assert {tuple(state["exp_avg"].shape) for state in saved["state"].values()} == {
        tuple(param.shape) for name, param in zero.named_parameters() if "extra" not in name
    }
    own = adamw(groups(zero))
    own.load_state_dict(saved)
    train(zero, plain, own, other, range(3, 5))


def test_closures_and_gradients_scaled_before_the_step() -> None:
    zero, plain = pair()
    own, other = SGD(zero.parameters(), lr=0.1), SGD(plain.parameters(), lr=0.1)
    for seed in range(2):
        for module, optimizer in ((zero, own), (plain, other)):

            def closure(
                module: nn.Module = module, optimizer: torch.optim.Optimizer = optimizer, seed: int = seed
            ) -> torch.Tensor:
                optimizer.zero_grad()
                torch.manual_seed(seed)
                loss = module(points(seed)).loss
                loss.backward()
                torch._foreach_mul_([p.grad for p in module.parameters() if p.grad is not None], 0.5)
                return loss

            optimizer.step(closure)
        assert_same(zero, plain)


# -- refused -----------------------------------------------------------------------------------------------------


class Own(torch.optim.SGD):
    """Of the user. That it reads a size makes no difference, but only the user knows."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            assert all(param.numel() >= 0 for param in group["params"])
        return super().step(closure)


@pytest.fixture(autouse=True)
def _no_warnings_of_torch() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        yield


@pytest.mark.parametrize(
    "make",
    [torch.optim.LBFGS, torch.optim.SparseAdam, Own],
)
def test_optimizers_that_cannot_step_shards_are_refused_at_compile_and_at_their_first_step(make: Make) -> None:
    def model() -> nn.Module:
        return nn.Linear(3, 3, bias=False)

    passed = model()
    optimizer = make(passed.parameters())
    name = type(optimizer).__name__
    with pytest.raises(OptimizerError, match=f"{name} (cannot step shards|is not known to be element-wise)"):
        fxzero.compile(passed, optimizer=optimizer)
    passed(torch.ones(1, 3))  # it was not taken over
    zero = fxzero.compile(model())
    zero(torch.ones(1, 3)).sum().backward()
    optimizer = make(zero.parameters())
    with pytest.raises(OptimizerError, match=f"{name} (cannot step shards|is not known to be element-wise)"):
        optimizer.step(lambda: 1.0)


def test_an_optimizer_of_the_users_own_is_accepted_on_their_word() -> None:
    zero, plain = pair(elementwise_optimizer=True)
    train(zero, plain, Own(zero.parameters(), lr=0.1), Own(plain.parameters(), lr=0.1))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(OptimizerError, match="AdamW holds no parameter of this model"):
        fxzero.compile(Net(), optimizer=adamw(Net().parameters()))


def test_an_optimizer_of_another_model_steps_as_ever() -> None:
    zero, _ = pair()
    other = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(other.parameters())
    zero(points()).loss.backward()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = other(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
