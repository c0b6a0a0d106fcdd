"""Random small models: parameters that are shared, frozen, unused, tied the other way round, cast or concatenated."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 5
"""Divides by no world size that is tested."""


@dataclass(frozen=True)
class Op:
    """One operator: which, which of the values before it, which matrices, which vectors."""

    kind: str
    inputs: tuple[int, int]
    matrices: tuple[int, int]
    vectors: tuple[int, int]


@dataclass(frozen=True)
class NetSpec:
    """A random model in values that can be printed, compared and shrunk."""

    ops: tuple[Op, ...]
    frozen_matrices: tuple[bool, ...]
    frozen_vectors: tuple[bool, ...]

    def __repr__(self) -> str:
        ops = ", ".join(f"{op.kind}{op.inputs}{op.matrices}{op.vectors}" for op in self.ops)
        return f"NetSpec({ops}; frozen {self.frozen_matrices} {self.frozen_vectors})"


def choose_net(choose: Callable[[int], int]) -> NetSpec:
    """A model of 1 to 8 operators over 1 to 4 matrices and 2 to 4 vectors; about one parameter in four is frozen."""
    num_matrices, num_vectors = 1 + choose(4), 2 + choose(3)

    def two(count: int) -> tuple[int, int]:
        return choose(count), choose(count)

    ops = tuple(
        Op(OPS[choose(len(OPS))], two(index + 1), two(num_matrices), two(num_vectors)) for index in range(1 + choose(8))
    )
    frozen = [choose(4) == 3 for _ in range(num_matrices + num_vectors)]
    return NetSpec(ops, tuple(frozen[:num_matrices]), tuple(frozen[num_matrices:]))


def random_net(seed: int) -> NetSpec:
    """The model of a seed."""
    return choose_net(random.Random(seed).randrange)


class RandomNet(nn.Module):
    """Runs a NetSpec; the loss is the mean square of its last value."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.spec = spec
        matrices = [nn.Parameter(torch.randn(WIDTH, WIDTH) / 2, not frozen) for frozen in spec.frozen_matrices]
        vectors = [nn.Parameter(torch.randn(WIDTH), not frozen) for frozen in spec.frozen_vectors]
        self.matrices, self.vectors = nn.ParameterList(matrices), nn.ParameterList(vectors)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a scalar."""
        values = [x]
        for op in self.spec.ops:
            values.append(self._run(op, values[op.inputs[0]], values[op.inputs[1]]))
        return values[-1].square().mean()

    def _run(self, op: Op, x: Tensor, y: Tensor) -> Tensor:
        w, other = (self.matrices[index] for index in op.matrices)
        v, bias = (self.vectors[index] for index in op.vectors)
        compute: dict[str, Callable[[], Tensor]] = {
            "linear": lambda: F.linear(x, w),
            "linear_bias": lambda: F.linear(x, w, bias),
            "transposed": lambda: x @ w,
            "add": lambda: x + y,
            "mul": lambda: x * v,
            "gelu": lambda: F.gelu(x),
            "tanh": lambda: torch.tanh(x),
            "norm": lambda: F.layer_norm(x, (WIDTH,), v, bias),
            "concatenated": lambda: F.linear(x, torch.cat([w[:3], other[3:]])),
            "scaled": lambda: x * w.sum(),
            "cast": lambda: F.linear(x.bfloat16(), w.bfloat16()).float(),
            "dropout": lambda: F.dropout(x, 0.3, self.training),
            "row": lambda: x * w[0] + other[1:2],
            "regularized": lambda: x + w.square().mean() + v[0],
            "detached": lambda: x.detach() * v,
            "in_place": lambda: (x * v).mul_(bias).add_(y),
            "checkpointed": lambda: checkpoint(lambda z: F.dropout(F.linear(z, w).tanh(), 0.3), x, use_reentrant=False),
        }
        return compute[op.kind]()


OPS = (
    *("linear", "linear_bias", "transposed", "add", "mul", "gelu", "tanh", "norm", "concatenated", "scaled", "cast"),
    *("dropout", "row", "regularized", "detached", "in_place", "checkpointed"),
)
