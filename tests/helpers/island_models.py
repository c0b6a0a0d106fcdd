"""Models with parts that no tracer can follow, each with the batch of a seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class Around(nn.Module):
    """Traced layers around a part; the loss is a mean of squares."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.head, self.part, self.tail = nn.Linear(WIDTH, WIDTH), part, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        hidden = self.part(torch.tanh(self.head(x)))
        return self.tail(torch.relu(hidden)).square().mean()


class Branch(nn.Module):
    """A branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """One of two values."""
        y = self.linear(x) * 3
        return y * 0.5 if y.abs().max() > 3 else y


class Experts(nn.Module):
    """A mixture of experts: each sees the tokens that chose it, some see none."""

    def __init__(self, num_experts: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, num_experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what the best expert of each token gives."""
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            where = torch.nonzero(chosen == index)[:, 0]
            if where.numel():
                out = out.index_add(0, where, expert(x[where]) * weight[where, None])
        return out


class DropLayers(nn.Module):
    """Skips layers by Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """The input through about half of the layers."""
        for layer in self.layers:
            if random.random() < 0.5:
                x = torch.tanh(layer(x))
        return x


class NormAndDropout(nn.Module):
    """Writes buffers, draws, and branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.branch, self.drop = nn.BatchNorm1d(WIDTH), Branch(), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Batch norm, dropout, and a branch between two draws."""
        self.calls = self.calls + 1
        x = self.drop(self.norm(x))
        if x.sum().item() > 1e9:
            return x
        return self.drop(self.branch(x))


class Residual(nn.Module):
    """Reads its input three times, as does what is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Products()

    def forward(self, x: Tensor) -> Tensor:
        """A residual."""
        return x + self.inner(x)


class Products(nn.Module):
    """Reads its input three times, and branches."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Products of three layers."""
        y = self.q(x) * self.k(x) + self.v(x)
        return y if y.max() < 1e9 else y * 2


class Tied(nn.Module):
    """A weight that the island reads twice, and that is read outside of it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.part, self.tail = nn.Linear(WIDTH, WIDTH), Twice(), nn.Linear(WIDTH, WIDTH)
        self.tail.weight = self.part.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        return self.tail(torch.relu(self.part(self.head(x)))).square().mean()


class Twice(nn.Module):
    """Reads its weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Two layers of one weight."""
        y = self.linear(torch.tanh(self.linear(x)))
        return y if y.max() < 1e9 else y * 2


class WritesItsInput(nn.Module):
    """Writes into the tensor that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """A layer of what it wrote."""
        if x.sum() > 1e9:
            return x
        x.mul_(0.5).add_(1)
        return self.linear(x)


class ReadsWhatIsWritten(nn.Module):
    """Reads a tensor that a part has written into."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.part = nn.Linear(WIDTH, WIDTH), WritesItsInput()

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        hidden = self.head(x)
        return (self.part(hidden) + hidden).square().mean()


class Sequences(nn.Module):
    """An LSTM, whose kernel on the CPU no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        """The states of the last layer."""
        return self.lstm(x[None])[0][0]


class Neighbours(nn.Module):
    """Adds rows by a sparse matrix that forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The sums of rows up to each one."""
        return torch.sparse.mm(torch.ones(len(x), len(x)).tril().to_sparse(), self.linear(x))


class Expanded(Sequences):
    """Gives its kernel a tensor of which several elements are one."""

    def forward(self, x: Tensor) -> Tensor:
        """One row is one step of both sequences, which are equal."""
        return self.lstm(x[None].expand(2, -1, -1))[0].sum(0)


class Checkpointed(nn.Module):
    """A part in a checkpoint, and a checkpoint in a part."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.outer, self.inner, self.reentrant = NormAndDropout(), Branch(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Both in turn."""
        x = checkpoint(self.outer, x, use_reentrant=self.reentrant)
        y = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return y if y.sum().item() < 1e9 else y * 2


class Speech(nn.Module):
    """A CTC loss over lengths that are tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        logits = self.linear(x)[:, None].log_softmax(-1)
        target = torch.ones(1, 2, dtype=torch.long)
        return F.ctc_loss(logits, target, torch.tensor([len(x)]), torch.tensor([2]))


class Kernel(torch.autograd.Function):
    """Keeps its weight where no hook on saved tensors sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """A product."""
        ctx.weight = weight.detach()
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradients."""
        (x,), (grad,) = ctx.saved_tensors, grads
        return grad @ ctx.weight.t(), x.t() @ grad


class KeepsItsWeight(nn.Module):
    """Runs a kernel that keeps its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """A product."""
        y = Kernel.apply(x, self.weight)
        return y if y.sum().item() < 1e9 else y * 2


@dataclass(frozen=True)
class Case:
    """A model, and the paths of its islands."""

    build: Callable[[], nn.Module]
    islands: tuple[str, ...]


CASES: dict[str, Case] = {
    "branch": Case(lambda: Around(Branch()), ("part",)),
    "experts": Case(lambda: Around(Experts()), ("part",)),
    "layers dropped": Case(lambda: Around(DropLayers()), ("part",)),
    "buffers and draws": Case(lambda: Around(NormAndDropout()), ("part",)),
    "an input read again": Case(lambda: Around(Residual()), ("part.inner",)),
    "a tied weight": Case(Tied, ("part",)),
    "an input written": Case(ReadsWhatIsWritten, ("part",)),
    "LSTM": Case(lambda: Around(Sequences()), ("part.lstm",)),
    "LSTM on an expanded tensor": Case(lambda: Around(Expanded()), ("part.lstm",)),
    "sparse": Case(lambda: Around(Neighbours()), ("part",)),
    "checkpoints": Case(lambda: Around(Checkpointed(reentrant=False)), ("part",)),
    "reentrant checkpoints": Case(lambda: Around(Checkpointed(reentrant=True)), ("part",)),
    "CTC": Case(Speech, ("",)),
    "a weight out of sight": Case(lambda: Around(KeepsItsWeight()), ("part",)),
    "layers of one kind": Case(
        lambda: Around(nn.Sequential(*(Branch() for _ in range(3)))), ("part.0", "part.1", "part.2")
    ),
}


def points(seed: int, batch: int = 5) -> Tensor:
    """A batch."""
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))


def seed_all(seed: int) -> None:
    """Seed torch and Python."""
    torch.manual_seed(seed)
    random.seed(seed)
