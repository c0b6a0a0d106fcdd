"""What ranks do to weights, gradients and optimizers outside of a step, beside replicated training."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxzero


def net() -> nn.Module:
    """A model with parameters of several sizes, of which three ranks hold parts, wholes and nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 3))


def points(rank: int, step: int = 0) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * rank + step))


def average_grads(model: nn.Module) -> None:
    """Average gradients over the ranks, summed in rank order."""
    for param in model.parameters():
        if param.grad is not None:
            parts = [torch.empty_like(param.grad) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, param.grad)
            param.grad = sum(parts[1:], parts[0]) / len(parts)


def pair(rank: int, **options: Any) -> tuple[nn.Module, fxzero.ZeroModule]:
    """The plain model, and the compiled one with its shards."""
    return net(), fxzero.compile(net(), example=points(rank), **options)


def step_both(
    plain: nn.Module, zero: fxzero.ZeroModule, optimizers: tuple[torch.optim.Optimizer, ...], rank: int, step: int
) -> None:
    for module, optimizer in zip((plain, zero), optimizers, strict=True):
        module(points(rank, step)).pow(2).mean().backward()
        if module is plain:
            average_grads(plain)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_weights(zero: fxzero.ZeroModule, plain: nn.Module) -> None:
    state = zero.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name


# -- other data in the place of shards -------------------------------------------------------------------------------


def _swap_pointers(module: nn.Module, shadow: dict[str, Tensor]) -> Callable[[], None]:
    backup = {name: param.data for name, param in module.named_parameters()}
    for name, param in module.named_parameters():
        param.data = shadow[name]

    def restore() -> None:
        for name, param in module.named_parameters():
            param.data = backup[name]

    return restore


def _exchange_pointers(module: nn.Module, shadow: dict[str, Tensor]) -> Callable[[], None]:
    def exchange() -> None:
        for name, param in module.named_parameters():
            param.data, shadow[name] = shadow[name], param.data

    exchange()
    return exchange


def _swap_tensors(module: nn.Module, shadow: dict[str, Tensor]) -> Callable[[], None]:
    others = {name: nn.Parameter(value) for name, value in shadow.items()}

    def swap() -> None:
        for name, param in module.named_parameters():
            torch.utils.swap_tensors(param, others[name])

    swap()
    return swap


SWAPS = {"pointers": _swap_pointers, "exchanged": _exchange_pointers, "swap_tensors": _swap_tensors}


def averaged_weights(rank: int, world_size: int, swap: str) -> None:
    """Train, evaluate with averaged weights in the place of the shards, put the shards back; as in plain PyTorch."""
    plain, zero = pair(rank)
    optimizers = torch.optim.SGD(plain.parameters(), 0.1), torch.optim.SGD(zero.parameters(), 0.1)
    shadows = [{name: p.data.clone() for name, p in module.named_parameters()} for module in (plain, zero)]
    for step in range(3):
        step_both(plain, zero, optimizers, rank, step)
        outputs = list[list[Tensor]]()
        for module, shadow in zip((plain, zero), shadows, strict=True):
            for name, param in module.named_parameters():
                shadow[name] = 0.5 * shadow[name] + 0.5 * param.data
            restore = SWAPS[swap](module, shadow)
            with torch.no_grad():
                outputs.append([module(points(rank, 9))])
            restore()
            outputs[-1].append(module(points(rank, 9)).detach())
        for mine, theirs in zip(*outputs, strict=True):
            assert torch.equal(mine, theirs)
        assert_same_weights(zero, plain)


def attack_between_micro_steps(rank: int, world_size: int) -> None:
    """Gradients of perturbed weights are added (FGM), the weights put back as clones, buckets kept in between."""
    plain, zero = pair(rank, memory_budget=2**30)
    optimizers = torch.optim.SGD(plain.parameters(), 0.1), torch.optim.SGD(zero.parameters(), 0.1)
    for step in range(3):
        for module, optimizer in zip((plain, zero), optimizers, strict=True):
            weights = [param for param in module.parameters() if param.ndim == 2]
            first = list[Tensor]()
            for micro in range(2):
                module(points(rank, step)).pow(2).mean().backward()
                if module is plain and micro == 0:
                    first = [param.grad.clone() for param in plain.parameters() if param.grad is not None]
                    average_grads(plain)
                backups = [weight.data.clone() for weight in weights]
                if micro == 0:
                    for weight in weights:
                        assert weight.grad is not None
                        weight.data = weight.data + 0.01 * weight.grad
                    if module is plain:
                        for param, grad in zip(plain.parameters(), first, strict=True):
                            param.grad = grad
                else:
                    for weight, backup in zip(weights, backups, strict=True):
                        weight.data = backup
            if module is plain:
                average_grads(plain)
            optimizer.step()
            optimizer.zero_grad()
    for name, value in zero.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-6)
