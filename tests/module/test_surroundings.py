"""A compiled module among other code: other modules before and behind it, modes of autograd around it. World size 1."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.optim import Adam
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero.errors import CaptureError, FxzeroError, InputMismatchError
from tests.helpers.pairs import Net, assert_same, both, pair, points


def net(*widths: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])


def test_two_compiled_modules_train_against_each_other() -> None:
    torch.manual_seed(0)
    plain = net(4, 6, 6), net(6, 6, 1)
    own = [fxzero.compile(copy.deepcopy(module)) for module in plain]
    losses: list[list[float]] = []
    for generator, critic in (own, plain):
        optimizers = Adam(generator.parameters(), 0.01), Adam(critic.parameters(), 0.01)
        torch.manual_seed(1)
        for _ in range(3):
            noise, real = torch.randn(5, 4), torch.randn(5, 6)
            fake = generator(noise)
            gap = critic(real).mean() - critic(fake.detach()).mean()
            gap.backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
            critic.requires_grad_(False)
            loss = critic(fake).mean()
            loss.backward()
            critic.requires_grad_(True)
            optimizers[0].step()
            optimizers[0].zero_grad()
            losses.append([gap.item(), loss.item()])
    assert losses[:3] == losses[3:]
    for compiled, module in zip(own, plain, strict=True):
        assert_same(compiled, module)


def test_plain_layers_before_and_behind_and_a_checkpoint_around() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    zero, plain = pair(model)
    before, behind = nn.Linear(6, 6), nn.Linear(5, 1)
    others = copy.deepcopy(before), copy.deepcopy(behind)
    for module, first, last in ((zero, before, behind), (plain, *others)):

        def inner(x: torch.Tensor, module: nn.Module = module) -> Any:
            return module(x).logits

        for _ in range(2):
            last(checkpoint(inner, first(points()), use_reentrant=False)).sum().backward()
    assert_same(zero, plain)
    assert torch.equal(before.weight.grad, others[0].weight.grad)


def test_parametrized_weights() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            parametrizations.weight_norm(nn.Linear(6, 6)),
            parametrizations.spectral_norm(nn.Linear(6, 6)),
            parametrizations.orthogonal(nn.Linear(6, 6)),
        )

    zero, plain = fxzero.compile(build()), build()
    for seed in range(2):
        for output in both(zero, plain, points(seed)):
            output.square().mean().backward()
        assert_same(zero, plain)
    assert list(zero.state_dict()) == list(plain.state_dict())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "around", [torch.autograd.detect_anomaly, torch.autograd.graph.save_on_cpu, torch.profiler.profile]
)
def test_modes_of_autograd_around_the_call(around: Any, late: bool) -> None:
    zero, plain = pair()
    for module in (zero, plain):
        torch.manual_seed(0)
        with around():
            output = module(points())
            (output.logits.sum() if late else output.loss).backward()
    assert_same(zero, plain)


def test_a_grad_scaler_scales_and_steps() -> None:
    zero, plain = pair()
    for module in (zero, plain):
        optimizer, scaler = Adam(module.parameters(), 0.01), torch.amp.GradScaler("cpu")
        torch.manual_seed(0)
        for scale in (1.0, float("inf"), 1.0):
            scaler.scale(module(points()).loss * scale).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same(zero, plain)


def test_function_transforms_are_refused() -> None:
    zero, _ = pair()
    with pytest.raises(CaptureError, match="cannot be called inside torch.func transforms"):
        torch.func.grad(lambda x: zero(x).loss)(points())
    zero = fxzero.compile(net(4, 1))
    with torch.no_grad():
        zero(torch.ones(2, 4))
        with pytest.raises(CaptureError, match="cannot be called inside torch.func transforms"):
            torch.func.vmap(zero)(torch.ones(3, 2, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_forward_mode_differentiation_is_refused_around_the_call_and_right_inside() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value_and_slope = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))
            return (value_and_slope[0] - value_and_slope[1]).square().sum()

    model = Slope()
    plain, zero, x = copy.deepcopy(model), fxzero.compile(model), torch.ones(3, 4)
    for module in (zero, plain):
        module(x).backward()
    assert_same(zero, plain)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(CaptureError, match="inside of forward-mode AD"):
            torch.func.jvp(zero, (x,), (x,))
        with torch.set_grad_enabled(grad), forward_ad.dual_level(), pytest.raises(CaptureError, match="forward_ad"):
            zero(forward_ad.make_dual(x, x))


def test_a_function_mode_around_the_call_is_refused_and_a_default_device_is_not() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    zero = fxzero.compile(net(4, 1))
    with torch.device("cpu"):
        zero(torch.ones(2, 4))
    with Doubling(), pytest.raises(CaptureError, match="Doubling, a TorchFunctionMode"):
        zero(torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_trace_of_torchscript_is_refused() -> None:
    zero, x = fxzero.compile(net(4, 1)), torch.ones(2, 4)
    zero(x)
    with pytest.raises(CaptureError, match="torch.jit.trace would see nothing of a compiled step"):
        torch.jit.trace(zero, x)


def test_a_parameter_belongs_to_one_compiled_model() -> None:
    first, second = net(2, 2), net(2, 2)
    second[0].weight = first[0].weight
    zero = fxzero.compile(first)
    with pytest.raises(InputMismatchError, match=r"0.weight of a Sequential that was given to fxzero.compile"):
        fxzero.compile(second)
    zero(torch.ones(1, 2)).sum().backward()


def test_empty_and_scalar_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.linear(torch.cat([x, self.empty])) * self.scale).sum()

    torch.manual_seed(0)
    zero, plain = pair(Odd())
    optimizers = [Adam(module.parameters(), 0.01) for module in (zero, plain)]
    for _ in range(2):
        for output in both(zero, plain, torch.ones(2, 3)):
            output.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_same(zero, plain)
    assert [tuple(value.shape) for value in zero.state_dict().values()] == [(0, 3), (), (2, 3), (2,)]


def replace_bias(module: nn.Linear) -> None:
    module.bias = nn.Parameter(torch.zeros(8))


@pytest.mark.parametrize(
    "change", [replace_bias, lambda module: setattr(module, "bias", None), lambda module: delattr(module, "weight")]
)
def test_a_parameter_of_a_part_that_is_replaced_later_is_refused_by_name(change: Any) -> None:
    zero = fxzero.compile(net(4, 8, 1))
    zero(torch.ones(2, 4))
    change(zero.get_submodule("0"))
    with pytest.raises(FxzeroError, match=r"0\.(bias|weight) was added, removed or replaced"):
        zero(torch.ones(2, 4))


@pytest.mark.parametrize("change", [lambda module: setattr(module, "scale", None), lambda m: delattr(m, "scale")])
def test_a_buffer_that_is_removed_later_is_refused_by_name(change: Any) -> None:
    class Scaled(nn.Linear):
        scale: torch.Tensor

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * self.scale

    model = Scaled(4, 4)
    model.register_buffer("scale", torch.ones(4))
    zero = fxzero.compile(model)
    zero(torch.ones(2, 4))
    change(zero)
    with pytest.raises(InputMismatchError, match="buffer scale was removed"):
        zero(torch.ones(2, 4))
