"""Ranks with fused compute beside replicated training on the mean loss of all ranks."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import fxzero
from tests.helpers.regions import uncompiled


class Net(nn.Module):
    """Equal layers with norms, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 9)
        self.norms = nn.ModuleList(nn.LayerNorm(9) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.inner(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + F.gelu(layer(norm(h)))
        return F.cross_entropy(self.head(h), labels)


class Gated(Net):
    """Norms by root mean squares, and gates: pointwise operators beside each other."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.inner(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + h * layer(norm.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))) * 0.5
        return F.cross_entropy(self.head(h), labels)


def batch(rank: int, step: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 5, (rows,), generator=generator)


def train(rank: int, world_size: int, options: dict[str, Any], policy: bool) -> str:
    """Train four steps, ranks with batches of other sizes in the last two; returns the digest of the first plan."""
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    mp_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if policy else None
    zero = fxzero.compile(model, compute="fused", mp_policy=mp_policy, **options)
    own, other = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (zero, plain))
    digest = ""
    with uncompiled():
        for step in range(4):
            sizes = [4 + (each if step >= 2 else 0) for each in range(world_size)]
            loss = zero(*batch(rank, step, sizes[rank]))
            loss.backward()
            digest = digest or zero.schedule.saved().digest
            losses = [plain(*batch(each, step, sizes[each])) for each in range(world_size)]
            (sum(losses[1:], losses[0]) / world_size).backward()
            bound = 0.05 if policy else 1e-5
            torch.testing.assert_close(loss.float(), losses[rank], rtol=bound, atol=bound)
            for each in (own, other):
                each.step()
                each.zero_grad()
    return digest


def train_exactly(rank: int, world_size: int, options: dict[str, Any]) -> str:
    """Train three steps with exact compute beside eager compute, bit for bit; returns the digest of the plan."""
    torch.manual_seed(0)
    model = Gated()
    modules = [fxzero.compile(copy.deepcopy(model), compute=each, **options) for each in ("exact", "eager")]
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in modules]
    for step in range(3):
        losses: list[Tensor] = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            losses.append(module(*batch(rank, step, 4)))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(*losses)
        for (name, own), other in zip(modules[0].named_parameters(), modules[1].parameters(), strict=True):
            assert torch.equal(own, other), name
    assert "fused" in str(modules[0].schedule)
    return modules[0].schedule.saved().digest
