"""Hooks that run in backward, and other Python code that does: as in the plain model, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero.errors import CaptureError, FxzeroError
from fxzero.testing import run_ranks

seen: list[Any] = []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.factor, self.calls, self.norm = 1.0, 0, None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hooked(torch.relu(self.body(x)))).sum()

    def hooked(self, hidden: Tensor) -> Tensor:
        return hidden

    def keep(self, grad: Tensor) -> None:
        self.norm = grad.norm()

    def clip(self, grad: Tensor) -> Tensor:
        seen.append(grad.max())
        return grad.clamp(-0.1, 0.1)


class Norms(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        hidden.register_hook(lambda grad: seen.append(grad.norm().item()))
        return hidden


class Collected(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        hidden.register_hook(lambda grad: seen.append(grad))
        return hidden


class Doubled(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        hidden.register_hook(lambda grad: grad * 2)
        return hidden


class Kept(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        hidden.register_hook(self.keep)
        return hidden


class GradOfAWeight(Net):
    """Observes the very memory that a gradient is computed into."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body.weight.view(-1)
        weight.register_hook(lambda grad: seen.append(grad.tolist()))
        return self.head(torch.relu(x @ weight.view(4, 4).t())).sum()


class Reversal(torch.autograd.Function):
    """A gradient reversal, which reads its factor in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Net) -> Tensor:
        ctx.owner = owner
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -ctx.owner.factor * grad, None


class Reversed(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        return Reversal.apply(hidden, self)  # type: ignore[no-any-return]


class CheckpointedLoss(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            self.norm = x.pow(2).mean()
            return torch.tanh(x)

        out = checkpoint(block, hidden, use_reentrant=False)
        assert self.norm is not None
        return out + self.norm


def count(module: Any, grads: Any, outputs: Any) -> None:
    module.calls = getattr(module, "calls", 0) + 1
    seen.append((module.calls, outputs[0].sum().item()))


def of_output(module: nn.Module, outputs: Any) -> None:
    seen.append(outputs[0].abs().max().item())


def double_output(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2)


def nothing(model: Net, step: int) -> None:
    pass


def anneal(model: Net, step: int) -> None:
    model.factor = 1.0 + step // 2


def at_first(register: Callable[[Net], object]) -> Callable[[Net, int], None]:
    def act(model: Net, step: int) -> None:
        if step == 0:
            register(model)

    return act


def later(model: Net, step: int) -> None:
    if step == 2:
        model.head.register_full_backward_hook(count)


CASES: dict[str, tuple[type[Net], Callable[[Net, int], object]]] = {
    "of a tensor, which reads a value": (Norms, nothing),
    "of a tensor, which keeps it": (Collected, nothing),
    "of a tensor, which changes it": (Doubled, nothing),
    "of a tensor, which sets an attribute": (Kept, nothing),
    "of a view of a weight": (GradOfAWeight, nothing),
    "of a part": (Net, at_first(lambda model: model.body.register_full_backward_hook(count))),
    "of a part, before its backward": (Net, at_first(lambda m: m.head.register_full_backward_pre_hook(of_output))),
    "of the model": (Net, at_first(lambda model: model.register_full_backward_hook(count))),
    "registered later": (Net, later),
    "of forward, which writes": (Net, at_first(lambda model: model.body.register_forward_hook(double_output))),
    "a function that reads state": (Reversed, anneal),
    "a checkpoint that keeps a loss": (CheckpointedLoss, nothing),
}  # fmt: skip


def run(kind: type[Net], act: Callable[[Net, int], object], *, compiled: bool) -> list[Any]:
    seen.clear()
    torch.manual_seed(0)
    model = kind()
    results: list[Any] = []
    called = fxzero.compile(model) if compiled else model
    for step in range(5):
        act(model, step)
        x = torch.full((2, 4), 1.0 + step, requires_grad=True)
        called(x).backward()
        assert x.grad is not None
        values = [each.tolist() if isinstance(each, Tensor) else each for each in seen]
        grads = [param.grad.flatten().tolist() for param in model.parameters() if param.grad is not None]
        norm = None if model.norm is None else model.norm.item()
        results.append([grads, x.grad.tolist(), values, norm, model.calls])
        called.zero_grad()
    return results


@pytest.mark.parametrize("what", CASES)
def test_hooks_of_backward(what: str) -> None:
    assert run(*CASES[what], compiled=True) == run(*CASES[what], compiled=False)


class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        seen.append(1)
        return grad


class CountsInBackward(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        return Counted.apply(hidden)  # type: ignore[no-any-return]


class CountsInCheckpoint(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            self.calls += 1
            return torch.tanh(x)

        return checkpoint(block, hidden, use_reentrant=False)  # type: ignore[no-any-return]


class ChangesAndKeeps(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        hidden.register_hook(self.clip)
        return hidden


class ReadsForward(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        hidden.register_hook(lambda grad: seen.append((grad * hidden).sum().item()))
        return hidden


class RetainsGrad(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        hidden.retain_grad()
        return hidden


class HooksSeveral(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        torch.autograd.graph.register_multi_grad_hook((hidden,), seen.append)
        return hidden


class HooksItsWeight(Net):
    def hooked(self, hidden: Tensor) -> Tensor:
        self.head.weight.register_hook(seen.append)
        return hidden


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (CountsInBackward, "The backward changes"),
        (CountsInCheckpoint, "The backward changes calls"),
        (ChangesAndKeeps, "The backward changes"),
        (ReadsForward, "hook ReadsForward.* reads a tensor of forward"),
        (RetainsGrad, "retain_grad"),
        (HooksSeveral, "register_multi_grad_hook"),
        (HooksItsWeight, r"hook on parameter head\.weight"),
    ],
)
def test_what_no_step_can_do_again_is_refused(kind: type[Net], message: str) -> None:
    seen.clear()
    model = kind()
    with pytest.raises(CaptureError, match=message):
        fxzero.compile(model, islands=())(torch.ones(2, 4))
    assert not seen
    assert model.calls == 0


class TwoLosses(Net):
    def forward(self, x: Tensor) -> Any:
        first, second = torch.relu(self.body(x)), torch.tanh(self.body(x))
        first.register_hook(lambda grad: seen.append(grad.norm().item()))
        second.register_hook(lambda grad: seen.append(-grad.norm().item()))
        return self.head(first).sum(), self.head(second).sum()


def observe_on_ranks(rank: int, world_size: int) -> None:
    """Hooks of losses that receive no gradient are not called; under no_sync() they are."""
    results: list[list[Any]] = []
    for compiled in (True, False):
        seen.clear()
        torch.manual_seed(0)
        model = TwoLosses()
        called = fxzero.compile(model) if compiled else model
        for step, chosen in enumerate(((0, 1), (0,), (0, 1), (1,))):
            losses = called(torch.full((2, 4), 1.0 + step + rank))
            with called.no_sync() if isinstance(called, fxzero.ZeroModule) and step == 2 else torch.enable_grad():
                torch.stack([losses[index] for index in chosen]).sum().backward()
        results.append(list(seen))
    assert results[0] == results[1]
    assert len(results[0]) == 6


def test_hooks_observe_the_gradients_of_this_rank() -> None:
    run_ranks(2, observe_on_ranks)


class TwoStages(Net):
    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.body(x))
        return hidden, self.head(hidden).sum(), torch.tanh(self.body(x)).sum()


@pytest.mark.parametrize("want", [Tensor.retain_grad, lambda tensor: tensor.register_hook(seen.append)])
def test_the_gradient_of_an_output_that_a_loss_comes_from_is_refused(want: Callable[[Tensor], object]) -> None:
    zero = fxzero.compile(TwoStages())
    hidden, loss, _ = zero(torch.ones(2, 4))
    want(hidden)
    with pytest.raises(FxzeroError, match="inside of forward"):
        loss.backward()


def test_the_gradient_of_an_output_that_a_loss_outside_comes_from_is_whole() -> None:
    zero = fxzero.compile(TwoStages())
    hidden, _, other = zero(torch.ones(2, 4))
    hidden.retain_grad()
    (hidden.pow(2).sum() + other).backward()
    assert torch.equal(hidden.grad, 2 * hidden)
