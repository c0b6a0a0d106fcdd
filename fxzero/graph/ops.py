"""The vocabulary that the passes write: targets of `call_function` nodes, beside the ATen operators of the model.

    start  = all_gather(shard, ...)             start gathering the members of one bucket
    params = wait(start)                        the unsharded parameters, one output per member
    release(params)                             end of their lifetime
    memory = grad_slot(fqn, shape)              the place of a gradient in its bucket, for operators with `out=`
    slot   = write_grad(grad, fqn)              copy the gradient to its place, unless it was computed there
    start  = reduce_scatter(slot, ...)          start reducing the gradients of one bucket
    shards = wait(start)                        this rank's gradient shards
    end_forward()                               the boundary between the forward and the backward phase
    handle, *results = island_forward(site, ..) a part of the model that runs as it is; these two are called
    gradients = island_backward(site, ..)       its backward
    observe(observer, *tensors)                 a hook of the model that only looks at tensors; called too
    results = region(region, inputs, places)    operators that are compiled together; called too

The position of a node in the graph is its place in the schedule. The functions, but for the last four, are never
called: `codegen.py` replaces them.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import fx

from fxzero.graph.wire import WireFormat


def _only_in_a_graph(name: str) -> NoReturn:
    raise RuntimeError(f"fxzero.graph.ops.{name} is a word of the schedule; the code generator replaces it")


@fx.has_side_effect
def all_gather(*shards: Any, format: WireFormat | None = None, inside: bool = False) -> Any:
    """Start gathering the members of one bucket. A rank receives (W-1)/W of the bytes that travel.

    Args:
        format: the wire format; None for the dtype of the bucket.
        inside: gather only from the secondary shards of this rank's node.
    """
    _only_in_a_graph("all_gather")


@fx.has_side_effect
def wait(started: Any) -> Any:
    """Wait for a collective. Its outputs are the unsharded parameters or the gradient shards, one per member."""
    _only_in_a_graph("wait")


@fx.has_side_effect
def release(params: Any) -> None:
    """Free the memory of a gathered bucket for other buckets."""
    _only_in_a_graph("release")


def grad_slot(fqn: str, shape: tuple[int, ...]) -> Any:
    """The place of a gradient in its bucket, as a tensor of `shape`, which has as many elements as the parameter."""
    _only_in_a_graph("grad_slot")


@fx.has_side_effect
def write_grad(grad: Any, fqn: str) -> Any:
    """Write the full gradient of parameter `fqn` to its place in the gradient bucket; None writes zeros."""
    _only_in_a_graph("write_grad")


@fx.has_side_effect
def reduce_scatter(*slots: Any, format: WireFormat | None = None) -> Any:
    """Start averaging one gradient bucket over the ranks, of which each keeps its slice.

    Args:
        format: the wire format; None for the dtype of the bucket.
    """
    _only_in_a_graph("reduce_scatter")


@fx.has_side_effect
def end_forward() -> None:
    """The boundary between the forward and the backward phase."""
    _only_in_a_graph("end_forward")


@fx.has_side_effect
def island_forward(
    site: Any, again: Any, inputs: Sequence[Any], params: Sequence[Any], buffers: Sequence[Any]
) -> Sequence[Any]:
    """Run the forward of an island; see `fxzero.capture.islands.site.Site.forward`."""
    return site.forward(again, inputs, params, buffers)


def island_backward(
    site: Any,
    handle: Any,
    grads: Sequence[Any],
    inputs: Sequence[Any],
    params: Sequence[Any],
    buffers: Sequence[Any],
    sums: Sequence[Any],
) -> Sequence[Any]:
    """Run the backward of an island; see `fxzero.capture.islands.site.Site.backward`."""
    return site.backward(handle, grads, inputs, params, buffers, sums)


@fx.has_side_effect
def observe(observer: Any, *tensors: Any) -> None:
    """Call a hook with tensors of the step; see `fxzero.capture.hooks.observer.Observer.run`."""
    observer.run(tensors)


def region(region: Any, inputs: Sequence[Any], places: Sequence[Any]) -> Sequence[Any]:
    """Run the operators of a region one by one; see `fxzero.graph.regions.Region`."""
    return region([*inputs, *places])
