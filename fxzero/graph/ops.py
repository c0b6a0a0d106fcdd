"""The vocabulary that the passes write: targets of `call_function` nodes, beside the ATen operators of the model.

    start  = all_gather(shard, ...)             shards of the members of one bucket -> a collective in flight
    params = wait(start)                        the unsharded parameters, one output per member
    release(params)                             nobody reads them any more
    memory = grad_slot(fqn, shape)              the place of a gradient in its bucket, for operators with `out=`
    slot   = write_grad(grad, fqn)              the gradient is in its place: copied, unless it was computed there
    start  = reduce_scatter(slot, ...)          the slots of one bucket -> a collective in flight
    shards = wait(start)                        this rank's gradient shards
    end_forward()                               what comes after it is the backward phase

A node's position is the schedule. The functions are never called: `codegen.py` replaces them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx


def _only_in_a_graph(name: str) -> NoReturn:
    raise RuntimeError(f"fxzero.graph.ops.{name} is a word of the schedule; the code generator replaces it")


@fx.has_side_effect
def all_gather(
    *shards: Any, dtype: torch.dtype | None = None, block_numel: int | None = None, inside: bool = False
) -> Any:
    """Start gathering the members of one bucket. Bytes received per rank: (W-1)/W of the bucket, as it travels.

    Args:
        dtype: in which it travels, if that is not the bucket's.
        block_numel: elements that share a scale, if it travels quantised.
        inside: from the secondary shards of this rank's node alone.
    """
    _only_in_a_graph("all_gather")


@fx.has_side_effect
def wait(started: Any) -> Any:
    """Wait for a collective; its outputs are the unsharded parameters or the gradient shards, one per member."""
    _only_in_a_graph("wait")


@fx.has_side_effect
def release(params: Any) -> None:
    """The memory of a gathered bucket may be used again from here on."""
    _only_in_a_graph("release")


def grad_slot(fqn: str, shape: tuple[int, ...]) -> Any:
    """The slot of a gradient as a tensor of `shape`, which has as many elements as the parameter."""
    _only_in_a_graph("grad_slot")


@fx.has_side_effect
def write_grad(grad: Any, fqn: str) -> Any:
    """The full gradient of parameter `fqn` lies in its slot of the gradient bucket from here on; None writes zeros."""
    _only_in_a_graph("write_grad")


@fx.has_side_effect
def reduce_scatter(*slots: Any, dtype: torch.dtype | None = None) -> Any:
    """Start averaging one gradient bucket over the ranks, each keeping its slice.

    Args:
        dtype: in which it travels, if that is not the bucket's.
    """
    _only_in_a_graph("reduce_scatter")


@fx.has_side_effect
def end_forward() -> None:
    """The boundary between the forward and the backward phase."""
    _only_in_a_graph("end_forward")
