"""Collectives that write into their arguments, traced as functional ones and copies of what these return.

    dist.all_reduce(x)          x.copy_(wait_tensor(all_reduce(x, "sum", group)))

Both reach the same call of the process group, so that the numbers are equal. What one rank sends to several, or several
to one, is an all-to-all in which the other parts are empty.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.errors import CaptureError

aten = torch.ops.aten


def writes_across_ranks(op: Any) -> bool:
    """True for a collective that writes into its arguments, as those of torch.distributed do."""
    return op.namespace == "c10d"


def run_functional(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the functional collectives that do what `op` does; what `op` would return.

    Raises:
        CaptureError: there are none for it.
    """
    arguments = torch_internals.named_arguments(op, args, kwargs)
    run = _RUN.get(op)
    if run is None:
        raise CaptureError(
            f"{op}, behind a call of torch.distributed, is no collective that a compiled step can have. Those that it "
            "can have are all_reduce, all_gather, all_gather_into_tensor, reduce_scatter, reduce_scatter_tensor, "
            "all_to_all, all_to_all_single, broadcast, scatter and gather; or call it before the step, and pass the "
            "result in."
        )
    run(_Group(arguments["process_group"]), arguments)
    return torch_internals.result_of_collective(op, args)


class _Group:
    """The functional collectives of one process group."""

    def __init__(self, boxed: Any) -> None:
        group = torch_internals.unboxed_group(boxed)
        self.size, self.rank, self._name = group.size(), group.rank(), group.group_name
        self._group = group
        self._ops = torch_internals.FUNCTIONAL_COLLECTIVES

    def is_gloo_for(self, tensor: Tensor) -> bool:
        """True if gloo moves a tensor."""
        return torch_internals.backend_name(self._group, tensor.device) == "gloo"

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._wait(self._ops.all_reduce.default(x.contiguous(), _reduction(), self._name))

    def all_gather(self, x: Tensor) -> Tensor:
        return self._wait(self._ops.all_gather_into_tensor.default(x.contiguous(), self.size, self._name))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._wait(self._ops.reduce_scatter_tensor.default(x.contiguous(), _reduction(), self.size, self._name))

    def all_to_all(self, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        """
        Args:
            x: rows for rank 0, then rows for rank 1, and so on.
            received: how many rows come from each rank.
            sent: how many go to each.
        """
        return self._wait(self._ops.all_to_all_single.default(x.contiguous(), [*received], [*sent], self._name))

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return self._wait(self._ops.broadcast.default(x.contiguous(), root, self._name))

    def exchange(self, out: Sequence[Tensor], sent: Sequence[Tensor]) -> None:
        """An all-to-all of tensors of any shapes, one for each rank."""
        flat = torch.cat([each.reshape(-1) for each in sent])
        received = [each.numel() for each in out]
        found = self.all_to_all(flat, received, [each.numel() for each in sent])
        for each, part in zip(out, found.split(received), strict=True):
            each.copy_(part.view(each.shape))

    def nothing_but(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """For each rank an empty tensor, but for one."""
        return [tensor if each == rank else tensor.new_empty(0) for each in range(self.size)]

    def _wait(self, started: Tensor) -> Tensor:
        return self._ops.wait_tensor.default(started)


def _reduction() -> str:
    """How the running call of torch.distributed reduces.

    Raises:
        CaptureError: it reduces in a way that functional collectives do not know.
    """
    op = torch_internals.running_reduction()
    for name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"):
        if op == getattr(torch.distributed.ReduceOp, name):
            return name.lower()
    raise CaptureError(
        f"A collective of the forward reduces by {op or 'an unknown operation'}. A compiled step can have SUM, AVG, "
        "PRODUCT, MIN, MAX, BAND, BOR and BXOR of torch.distributed's functions."
    )


def _all_reduce(group: _Group, arguments: dict[str, Any]) -> None:
    for tensor in arguments["tensors"]:
        tensor.copy_(group.all_reduce(tensor))


def _all_gather(group: _Group, arguments: dict[str, Any]) -> None:
    for outs, tensor in zip(arguments["output_tensors"], arguments["input_tensors"], strict=True):
        if any(out.numel() != tensor.numel() for out in outs):
            raise CaptureError(
                "A collective of the forward gathers tensors of different sizes. In a compiled step ranks give tensors "
                "of one size: pad them."
            )
        rows = group.all_gather(tensor.reshape(1, -1))
        for out, row in zip(outs, rows.unbind(), strict=True):
            out.copy_(row.view(out.shape))


def _all_gather_base(group: _Group, arguments: dict[str, Any]) -> None:
    out = arguments["output_tensor"]
    out.copy_(group.all_gather(arguments["input_tensor"].reshape(1, -1)).view(out.shape))


def _reduce_scatter(group: _Group, arguments: dict[str, Any]) -> None:
    for out, tensors in zip(arguments["output_tensors"], arguments["input_tensors"], strict=True):
        if group.is_gloo_for(out):  # which reduces each of them on all ranks, in an order of its own
            out.copy_([group.all_reduce(each) for each in tensors][group.rank])
        else:
            out.copy_(group.reduce_scatter(torch.cat([each.reshape(-1) for each in tensors])).view(out.shape))


def _reduce_scatter_base(group: _Group, arguments: dict[str, Any]) -> None:
    out = arguments["output_tensor"]
    out.copy_(group.reduce_scatter(arguments["input_tensor"].reshape(-1)).view(out.shape))


def _all_to_all(group: _Group, arguments: dict[str, Any]) -> None:
    group.exchange(arguments["output_tensors"], arguments["input_tensors"])


def _all_to_all_base(group: _Group, arguments: dict[str, Any]) -> None:
    out, tensor = arguments["output"], arguments["input"]
    received, sent = (
        arguments[name] or [each.shape[0] // group.size] * group.size
        for name, each in (("output_split_sizes", out), ("input_split_sizes", tensor))
    )
    out.copy_(group.all_to_all(tensor, received, sent))


def _broadcast(group: _Group, arguments: dict[str, Any]) -> None:
    for tensor in arguments["tensors"]:
        tensor.copy_(group.broadcast(tensor, arguments["root_rank"]))


def _scatter(group: _Group, arguments: dict[str, Any]) -> None:
    (out,), root = arguments["output_tensors"], arguments["root_rank"]
    empty = [out.new_empty(0)] * group.size
    group.exchange(group.nothing_but(root, out), arguments["input_tensors"][0] if group.rank == root else empty)


def _gather(group: _Group, arguments: dict[str, Any]) -> None:
    (tensor,), root = arguments["input_tensors"], arguments["root_rank"]
    empty = [tensor.new_empty(0)] * group.size
    group.exchange(arguments["output_tensors"][0] if group.rank == root else empty, group.nothing_but(root, tensor))


_C10D = torch.ops.c10d
_RUN: dict[Any, Callable[[_Group, dict[str, Any]], None]] = {
    _C10D.allreduce_.default: _all_reduce,
    _C10D.allgather_.default: _all_gather,
    torch_internals.ALL_GATHER_BASE: _all_gather_base,
    _C10D.reduce_scatter_.default: _reduce_scatter,
    torch_internals.REDUCE_SCATTER_BASE: _reduce_scatter_base,
    _C10D.alltoall_.default: _all_to_all,
    _C10D.alltoall_base_.default: _all_to_all_base,
    _C10D.broadcast_.default: _broadcast,
    _C10D.scatter_.default: _scatter,
    _C10D.gather_.default: _gather,
}
