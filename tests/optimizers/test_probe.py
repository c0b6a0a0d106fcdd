"""Tests of optimizers.probe: whether an optimizer is element-wise is found out by steps of small parameters."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.optimizers.classes import ELEMENTWISE
from fxzero.optimizers.probe import why_not_elementwise

FORMULAS: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = {}
"""Updates by name: of a parameter, its gradient and its state."""


def formula(function: Callable[[Tensor, Tensor, dict[str, Any]], Tensor]) -> Any:
    FORMULAS[function.__name__] = function
    return function


@formula
def lion(param: Tensor, grad: Tensor, state: dict[str, Any]) -> Tensor:
    momentum = state.setdefault("momentum", torch.zeros_like(param))
    update = momentum.lerp(grad, 0.1).sign()
    momentum.lerp_(grad, 0.01)
    return update


@formula
def adam(param: Tensor, grad: Tensor, state: dict[str, Any]) -> Tensor:
    state["step"] = state.get("step", 0) + 1
    mean = state.setdefault("mean", torch.zeros_like(param)).lerp_(grad, 0.1)
    square = state.setdefault("square", torch.zeros_like(param)).mul_(0.99).addcmul_(grad, grad, value=0.01)
    return mean / (1 - 0.9 ** state["step"]) / (square.sqrt() + 1e-8)


@formula
def layer_wise(param: Tensor, grad: Tensor, state: dict[str, Any]) -> Tensor:
    return grad * (param.norm() / grad.norm())


@formula
def limited_by_the_largest(param: Tensor, grad: Tensor, state: dict[str, Any]) -> Tensor:
    return grad if grad.numel() == 0 or float(grad.abs().max()) < 1e9 else grad / 1e9


@formula
def centralised(param: Tensor, grad: Tensor, state: dict[str, Any]) -> Tensor:
    return grad - grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True) if grad.ndim > 1 else grad


@formula
def noisy(param: Tensor, grad: Tensor, state: dict[str, Any]) -> Tensor:
    return grad + torch.randn_like(grad)


@formula
def first_element_left_alone(param: Tensor, grad: Tensor, state: dict[str, Any]) -> Tensor:
    update = grad.clone()
    update[:1] = 0
    return update


@formula
def other_for_large_ones(param: Tensor, grad: Tensor, state: dict[str, Any]) -> Tensor:
    return grad.sign() if param.shape[0] > 100_000 else grad


class Own(torch.optim.Optimizer):
    """An optimizer of the user, by the name of its formula."""

    def __init__(self, params: Any, name: str, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.formula = FORMULAS[name]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * self.formula(param, param.grad, self.state[param]))


class GlobalNorm(torch.optim.SGD):
    """Limits the norm of all gradients, as few gradients exceed."""

    def step(self, closure: Any = None) -> Any:
        params = [param for group in self.param_groups for param in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, 1e20)
        return super().step(closure)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize("name", ["lion", "adam"])
def test_an_elementwise_optimizer_of_the_users_trains_shards(name: str):
    plain, taken = model(), model()
    zero = fxzero.compile(taken)
    own, its = Own(zero.parameters(), name), Own(plain.parameters(), name)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((zero, own), (plain, its)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for key, value in zero.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layer_wise", "slices of parameters gives other numbers"),
        ("limited_by_the_largest", r"numel\(\)"),
        ("centralised", "slices of parameters gives other numbers"),
        ("noisy", "slices of parameters gives other numbers"),
        ("first_element_left_alone", "slices of parameters gives other numbers"),
        ("other_for_large_ones", "reads sizes of tensors"),
    ],
)
def test_an_optimizer_that_may_look_at_other_elements_is_refused(name: str, reason: str):
    zero = fxzero.compile(model())
    optimizer = Own(zero.parameters(), name)
    zero(torch.ones(1, 5)).sum().backward()
    with pytest.raises(fxzero.errors.OptimizerError, match=f"not known to be element-wise.*{reason}"):
        optimizer.step()


def test_a_norm_that_changes_no_number_of_the_probe_is_found():
    assert "several elements of a tensor at once" in str(why_not_elementwise(GlobalNorm(model().parameters(), lr=0.1)))


@pytest.mark.parametrize("cls", ELEMENTWISE)
def test_a_subclass_of_an_elementwise_optimizer_is_elementwise(cls: type[torch.optim.Optimizer]):
    own = type("Own", (cls,), {})
    assert why_not_elementwise(own(model().parameters(), lr=0.1)) is None  # type: ignore[call-arg]


def test_a_probe_changes_nothing():
    net = model()
    optimizer = Own(net.parameters(), "noisy")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(3)
    random.seed(3)
    draws = torch.rand(1), random.random()
    torch.manual_seed(3)
    random.seed(3)
    why_not_elementwise(optimizer)
    assert (torch.rand(1), random.random()) == draws
    assert not optimizer.state
    for (key, value), param in zip(net.state_dict().items(), net.parameters(), strict=True):
        assert torch.equal(value, before[key]) and param.grad is None


def test_state_of_a_tensor_class_of_its_own_keeps_its_class():
    class Packed(Tensor):
        pass

    class Quantized(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for param in group["params"]:
                    self.state[param].setdefault("square", torch.zeros_like(param).as_subclass(Packed))

    zero = fxzero.compile(model(), elementwise_optimizer=True)
    optimizer = Quantized(zero.parameters(), {})
    for _ in range(2):
        zero(torch.ones(1, 5)).sum().backward()
        optimizer.step()
    assert {type(state["square"]) for state in optimizer.state.values()} == {Packed}
