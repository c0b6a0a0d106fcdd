"""Optimizers that step whole parameters, on ranks, beside the same optimizers of an unsharded model."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Adafactor, AdamW, Muon, Optimizer

import fxzero
from fxzero.errors import FxzeroError, OptimizerError

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Net(nn.Module):
    """Matrices that straddle shards, a convolution, vectors and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 24)
        self.up = nn.Linear(24, 40)
        self.mid = nn.Linear(40, 33, bias=False)
        self.down = nn.Linear(33, 24)
        self.conv = nn.Conv1d(24, 5, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.late = nn.Linear(24, 24, bias=False)
        self.head = nn.Linear(24, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting the token before."""
        hidden = self.emb(tokens)
        hidden = self.late(hidden + self.scale * self.down(F.gelu(self.mid(F.gelu(self.up(hidden))))))
        pooled = self.conv(hidden.transpose(1, 2)).mean()
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens.roll(1, 1).flatten()) + 0.1 * pooled


class Whitened(Optimizer):
    """An optimizer of the tests' own: scales the gradient by the norms of its rows."""

    def __init__(self, params: Any, over_all: bool = False) -> None:
        super().__init__(params, {"lr": 0.1})
        self._over_all = over_all

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        loss = closure() if closure else None
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = torch.stack([p.grad.norm() for p in params]).norm() if self._over_all and params else 1.0
        for p in params:
            norms = self.state[p].setdefault("norms", torch.zeros(len(p), 1))
            norms.add_(p.grad.flatten(1).norm(dim=1, keepdim=True))
            p.sub_(0.1 * p.grad / (norms.view(-1, *(1 for _ in p.shape[1:])) * total + 1e-3))
        return loss


def batch(step: int, rank: int) -> Tensor:
    """The tokens of a rank in a step."""
    return torch.randint(0, 13, (2, 6), generator=torch.Generator().manual_seed(100 * step + rank))


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon steps."""
    named = dict(model.named_parameters())
    return [named[f"{part}.weight"] for part in ("up", "mid", "down")]


def make(model: nn.Module, kind: str) -> list[Optimizer]:
    """Optimizers of all parameters but `late`."""
    params = [param for name, param in model.named_parameters() if not name.startswith("late")]
    if kind == "muon":
        others = [param for param in params if all(param is not each for each in matrices(model))]
        return [Muon(matrices(model), lr=0.02, weight_decay=0.1), AdamW(others, lr=0.01)]
    if kind == "whitened":
        return [fxzero.whole_matrices(Whitened([p for p in params if p.ndim > 1]))]
    return [Adafactor(params, lr=0.05, weight_decay=0.1, foreach=kind == "foreach")]


def mean_gradients(plain: nn.Module, steps: Sequence[int], world_size: int) -> None:
    """Let `.grad` be the mean over ranks of the sums over micro-batches, in the order in which shards have it."""
    totals: list[Tensor] | None = None
    for rank in range(world_size):
        plain.zero_grad()
        for step in steps:
            plain(batch(step, rank)).backward()
        own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in plain.parameters()]
        totals = own if totals is None else [total.add_(grad) for total, grad in zip(totals, own, strict=True)]
    for param, total in zip(plain.parameters(), totals or [], strict=True):
        if param.requires_grad:
            param.grad = total / world_size


def train(rank: int, world_size: int, kind: str, when: str, options: dict[str, Any]) -> None:
    """Accumulation, clipping, a closure, a group that is added, frozen parameters: equal bit for bit."""
    torch.manual_seed(0)
    model = Net()
    model.conv.weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    own = [] if when == "after" else make(model, kind)
    zero = fxzero.compile(model, optimizer=own if when == "passed" else None, **options)
    own, other = own or make(zero, kind), make(plain, kind)
    for step in range(4):
        micro_batches = [10 * step, 10 * step + 1]
        if step == 2:
            own[0].add_param_group({"params": [zero.late.weight]})
            other[0].add_param_group({"params": [plain.late.weight]})

        def closure(steps: Sequence[int] = micro_batches) -> float:
            with zero.no_sync():
                zero(batch(steps[0], rank)).backward()
            zero(batch(steps[1], rank)).backward()
            return 2.5

        loss = closure() if step else own[0].step(closure)
        mean_gradients(plain, micro_batches, world_size)
        if step:
            norm = zero.clip_grad_norm_(0.5)
            for param in (p for p in plain.parameters() if p.grad is not None):
                param.grad.mul_((0.5 / (norm + 1e-6)).clamp(max=1.0))
            own[0].step()
        assert loss == 2.5
        other[0].step()
        for each in own[1:] + other[1:]:
            each.step()
        for each in (zero, plain):
            each.zero_grad()
    found = zero.state_dict()
    assert [name for name, value in plain.state_dict().items() if not torch.equal(found[name], value)] == []
    assert all(p.shape[1:].numel() == 1 for p in zero.parameters())


def _is_equal(own: Any, other: Any) -> bool:
    return torch.equal(own, other) if isinstance(own, Tensor) else own == other


def differences(own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> list[str]:
    """Where the full states of optimizers differ, by name and key."""
    found: list[str] = []
    for mine, others in zip(own, other, strict=True):
        (a, b) = (
            {(fqn, key): value for fqn, state in each["state"].items() for key, value in state.items()}
            for each in (mine, others)
        )
        found += [f"{key}" for key in {*a, *b} if key not in a or key not in b or not _is_equal(a[key], b[key])]
    return found


def _steps(zero: nn.Module, optimizers: Sequence[Optimizer], steps: range) -> None:
    for step in steps:
        zero(batch(step, 0)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _full_state(zero: nn.Module, optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    return [copy.deepcopy(get_optimizer_state_dict(zero, optimizer, options=_FULL)) for optimizer in optimizers]


def _one_matrix(model: nn.Module) -> list[Optimizer]:
    return [Muon([dict(model.named_parameters())["up.weight"]], lr=0.02)]


def _plain_state(kind: str) -> list[dict[str, Any]]:
    """The same of an unsharded model and its optimizers."""
    torch.manual_seed(0)
    plain = Net()
    optimizers = _one_matrix(plain) if kind == "one" else make(plain, kind)
    _steps(plain, optimizers, range(2))
    return _full_state(plain, optimizers)


def save(rank: int, world_size: int, kind: str, path: Path) -> list[dict[str, Any]]:
    """Saves after two steps; full state as of an unsharded optimizer. A rank may own nothing."""
    torch.manual_seed(0)
    zero = fxzero.compile(Net())
    optimizers = _one_matrix(zero) if kind == "one" else make(zero, kind)
    _steps(zero, optimizers, range(2))
    fxzero.save(path, zero, optimizers)
    full = _full_state(zero, optimizers)
    if rank == 0:
        plain = _plain_state(kind)
        assert differences(full, plain) == [] or world_size == 3  # the mean of three is rounded
    own = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    _steps(zero, optimizers, range(2, 3))
    for optimizer, state in zip(optimizers, own, strict=True):
        optimizer.load_state_dict(state)
    again = _full_state(zero, optimizers)
    assert rank or differences(full, again) == []
    _steps(zero, optimizers, range(3, 4))
    return full


def load(rank: int, world_size: int, kind: str, path: Path, full: list[dict[str, Any]]) -> None:
    """What other ranks saved is the state here, by files and by full state dicts, before the first step and later."""
    torch.manual_seed(1)
    for how, steps in (("files", 0), ("full", 0), ("files", 1), ("full", 1)):
        zero = fxzero.compile(Net())
        optimizers = _one_matrix(zero) if kind == "one" else make(zero, kind)
        _steps(zero, optimizers, range(steps))
        if how == "files":
            fxzero.load(path, zero, optimizers)
        else:
            for optimizer, given in zip(optimizers, full, strict=True):
                set_optimizer_state_dict(zero, optimizer, copy.deepcopy(given), options=_FULL)
        found = _full_state(zero, optimizers)
        assert rank or differences(full, found) == []
        _steps(zero, optimizers, range(steps, steps + 1))


def refused(rank: int, world_size: int) -> str:
    """A frozen parameter with a gradient, then gradients on one rank alone; returns the error of the second."""
    zero = fxzero.compile(Net())
    muon = make(zero, "muon")[0]
    zero(batch(0, rank)).backward()
    for param in matrices(zero):
        param.requires_grad_(False)
    try:
        muon.step()
    except OptimizerError as error:
        assert "is frozen and has a gradient" in str(error)
    for param in matrices(zero):
        param.requires_grad_(True)
        if rank:
            param.grad = None
    try:
        muon.step()
    except FxzeroError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
