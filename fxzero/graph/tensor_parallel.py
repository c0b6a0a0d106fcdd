"""The place of a rank's part of a parameter that other ranks, which get the same batch, have other parts of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, eq=False)
class TensorParallel:
    """A parameter that was a DTensor: its local tensor is what the ranks of data parallelism cut into shards."""

    mesh: DeviceMesh
    """The ranks of tensor parallelism, of one dimension."""
    placement: Any
    """`Shard(dim)` or `Replicate()` of torch.distributed.tensor."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    offsets: tuple[int, ...]
    """The index in the whole parameter of the first element of this rank's local tensor."""

    @property
    def is_cut(self) -> bool:
        """False if each rank has the whole parameter."""
        return not self.placement.is_replicate()

    def cut(self, whole: Tensor, shape: Sequence[int]) -> Tensor:
        """The local tensor, of a shape, of a whole one; a view of it."""
        for dim, (offset, size) in enumerate(zip(self.offsets, shape, strict=True)):
            whole = whole.narrow(dim, offset, size)
        return whole

    def __str__(self) -> str:
        return f"{self.placement} of {self.mesh.size()}"


def offsets_of_chunk(shape: Sequence[int], dim: int, rank: int, num_ranks: int) -> tuple[int, ...]:
    """The index of the first element of a rank's chunk, of a tensor that is chunked as `torch.chunk` does it."""
    chunk = -(-shape[dim] // num_ranks)
    return tuple(min(rank * chunk, size) if index == dim else 0 for index, size in enumerate(shape))
