"""Policies by patterns of paths beside FSDP2 with the same policy for each module that has one of its own."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fxzero

WIDTH, CLASSES = 24, 31


class Experts(nn.Module):
    """Two layers, of which each row takes one: an island."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            (rows,) = (shares.argmax(-1) == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(x[rows]) * shares[rows, index, None].to(x.dtype))
        return out


class Block(nn.Module):
    """A norm whose result a buffer scales, and a part."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mlp
        self.gain: Tensor
        self.register_buffer("gain", torch.linspace(0.9, 1.1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x) * self.gain.to(x.dtype))


class Net(nn.Module):
    """Three blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        dense = (nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH)) for _ in range(2))
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList([Block(next(dense)), Block(Experts()), Block(next(dense))])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the mean loss of the next tokens."""
        x = self.embedding(tokens[:, :-1]).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)), tokens[:, 1:].flatten())


def _shard(model: nn.Module, policies: Mapping[str, MixedPrecisionPolicy]) -> None:
    """`fully_shard` the modules whose policy is not that of the module around them, and the model."""

    def policy_of(path: str) -> MixedPrecisionPolicy:
        parts = path.split(".") if path else []
        around = ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
        matching = [each for pattern, each in policies.items() if any(fnmatchcase(one, pattern) for one in around)]
        return matching[-1] if matching else MixedPrecisionPolicy()

    for path, module in reversed(list(model.named_modules())):
        outer = path.rpartition(".")[0]
        is_of_its_own = path and policy_of(path) != policy_of(outer)
        if is_of_its_own and not isinstance(module, nn.ModuleList) and any(True for _ in module.parameters()):
            fully_shard(module, mp_policy=policy_of(path))
    fully_shard(model, mp_policy=policy_of(""))


def train_as_fsdp2(
    rank: int, world_size: int, policies: Mapping[str, MixedPrecisionPolicy], options: dict[str, Any]
) -> None:
    """Fifty losses, equal bit for bit at two ranks; at three FSDP2's gloo adds in another order."""
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    _shard(theirs, policies)
    modules = [fxzero.compile(ours, mp_policy=policies, **options), theirs]
    optimizers = [torch.optim.AdamW(module.parameters(), lr=3e-3) for module in modules]
    for step in range(50):
        tokens = torch.randint(0, CLASSES, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))
        losses = [module(tokens) for module in modules]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(losses[0], losses[1], rtol=0.0 if world_size == 2 else 0.02, atol=0)
