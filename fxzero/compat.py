"""Every private torch symbol that fxzero uses, in one place, with the versions it was seen in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.distributed.distributed_c10d import Store
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx


def direct_call(op: Any) -> Any:
    """The builtin behind an operator overload: one Python call instead of two. `OpOverload._op`: 2.11 to 2.13."""
    return getattr(op, "_op", op)


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name of the backend that a group uses on a device, "none" if it has none there.

    `ProcessGroup._get_backend`: 2.11 to 2.13.
    """
    try:
        return cast(Any, group._get_backend(device)).name()
    except RuntimeError:
        return "none"


def all_gather_base(group: dist.ProcessGroup) -> Callable[..., dist.Work]:
    """`(full, shard)`: gather into one tensor, one Python call. `ProcessGroup._allgather_base`: 2.11 to 2.13."""
    return group._allgather_base


def reduce_scatter_base(group: dist.ProcessGroup) -> Callable[..., dist.Work]:
    """`(shard, full, options)`, as above. `ProcessGroup._reduce_scatter_base`: 2.11 to 2.13."""
    return group._reduce_scatter_base


def default_store() -> Store:
    """The store through which the default process group was set up. `_get_default_store`: 2.11 to 2.13."""
    return dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


# -- tracing: capture/ ---------------------------------------------------------------------------------------------


def fake_tensor_mode() -> Any:
    """Tensors without memory; real ones that a model holds become constants. `FakeTensorMode`: 2.11 to 2.13."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def trace_fx(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """The ATen operators that a function of fake tensors runs. `make_fx`: 2.11 to 2.13."""

    def traced(*values: Any) -> Any:  # make_fx counts the arguments of plain functions right, not of bound methods
        return function(*values)

    return make_fx(traced)(*inputs)


def traced_graph() -> fx.Graph:
    """The graph that `trace_fx` is making right now. `get_proxy_mode`: 2.11 to 2.13."""
    return cast(Any, get_proxy_mode()).tracer.graph


def python_dispatcher() -> Any:
    """Python decompositions first: batch norm then declares what it writes. `enable_python_dispatcher`: 2.11 to 2.13"""
    return enable_python_dispatcher()


def next_sequence_number() -> int:
    """The number that the next autograd node of this thread gets. `_get_sequence_nr`: 2.11 to 2.13."""
    return torch.autograd._get_sequence_nr()


def sequence_number(node: Any) -> int:
    """The number of an autograd node. `Node._sequence_nr`: 2.11 to 2.13."""
    return node._sequence_nr()


def apply_pending_updates(tensor: torch.Tensor) -> None:
    """Trace the updates that functionalization still holds back. `torch._sync`: 2.11 to 2.13."""
    if torch._is_functional_tensor(tensor):
        torch._sync(tensor)
