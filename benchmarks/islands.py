"""A step of a mixture of experts, which runs as one island, against eager PyTorch: seconds, and the host's own part.

    OMP_NUM_THREADS=1 python -m benchmarks.islands

Both take turns in one process at world size 1, without an optimizer, and count processor time. The experts are found by
`nonzero`, so that the module cannot be traced. A batch of a few tokens shows what the host does around each call.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxzero
from benchmarks.about import heading


class Expert(nn.Module):
    """Two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Up, SiLU, down."""
        return self.down(nn.functional.silu(self.up(x)))


class Experts(nn.Module):
    """Each token goes to the two best of some experts."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """The weighted sum of what they give."""
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            where, slot = torch.nonzero(ids == index, as_tuple=True)
            if where.numel():
                out.index_add_(0, where, expert(x[where]) * weights[where, slot, None])
        return out


class Model(nn.Module):
    """Two traced layers around the experts; the loss is a mean of squares."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.head, self.experts, self.tail = (
            nn.Linear(width, width),
            Experts(width, num_experts),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        return self.tail(self.experts(torch.tanh(self.head(x)))).square().mean()


def measure(width: int, tokens: int, num_experts: int, rounds: int) -> list[str]:
    """Median milliseconds of a step, of eager and of fxzero, the median ratio, and how many tensors eager saves."""
    torch.manual_seed(0)
    plain = Model(width, num_experts)
    x = torch.randn(tokens, width)
    zero = fxzero.compile(copy.deepcopy(plain), example=(x,))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
        plain(x).backward()
    seconds: dict[str, list[float]] = {"eager": [], "fxzero": []}
    for index in range(rounds + 3):
        for name, module in (("eager", plain), ("fxzero", zero)):
            begin = time.process_time()
            module(x).backward()
            if index >= 3:
                seconds[name].append(time.process_time() - begin)
            for param in module.parameters():
                param.grad = None
    ratio = statistics.median(b / a for a, b in zip(seconds["eager"], seconds["fxzero"], strict=True))
    medians = [statistics.median(each) * 1e3 for each in seconds.values()]
    return [f"{width} x {tokens}", *(f"{each:.2f} ms" for each in medians), f"{ratio:.3f}", str(len(saved))]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of the large step; the small one has ten times as many")
    parser.add_argument("--experts", type=int, default=8)
    options = parser.parse_args()
    lines = [
        measure(512, 1024, options.experts, options.rounds),
        measure(32, 64, options.experts, 10 * options.rounds),
    ]
    print(heading("python -m benchmarks.islands"))
    print(tabulate(lines, ["width x tokens", "eager", "fxzero", "median ratio", "tensors saved"]))


if __name__ == "__main__":
    main()
