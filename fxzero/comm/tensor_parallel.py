"""What ranks of tensor parallelism exchange outside of a step: the parts of a parameter that was a DTensor."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fxzero.graph.tensor_parallel import TensorParallel

_OPS: dict[str, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class Parts:
    """The ranks that have the parts of a parameter."""

    parallel: TensorParallel

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Reduce a small tensor over the ranks, in place."""
        dist.all_reduce(tensor, _OPS[op], group=self.parallel.mesh.get_group())

    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        """Overwrite a tensor with that of the first of the ranks."""
        if tensor.numel():
            flat = tensor.detach().contiguous()
            dist.broadcast(flat.view(-1).view(torch.uint8), group=self.parallel.mesh.get_group(), group_src=0)
            tensor.detach().copy_(flat)


def whole_of(parallel: TensorParallel | None, local: Tensor) -> Tensor:
    """The whole tensor of which each rank has a local part; a collective of the ranks of tensor parallelism."""
    if parallel is None or not parallel.is_cut:
        return local
    from torch.distributed.tensor import DTensor  # takes long to import

    like = torch.empty(parallel.shape, device="meta")
    placed: Any = DTensor.from_local(
        local.contiguous(),
        parallel.mesh,
        [parallel.placement],
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return placed.full_tensor()
