"""The two operators that stand for an island in a trace, and the autograd Function that joins them.

A traced graph has their overloads, with the number of a site. `bind` replaces them by `ops.island_forward` and
`ops.island_backward`, which take the site itself; no step calls an overload.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxzero.capture.islands.site import Site
from fxzero.graph import ops

_LIBRARY = torch.library.Library("fxzero", "DEF")
_LIBRARY.define(
    "island_forward(int site, Tensor? again, Tensor[] inputs, Tensor[] params, Tensor[] buffers) -> Tensor[]"
)
_LIBRARY.define(
    "island_backward(int site, Tensor handle, Tensor?[] grads, Tensor?[] inputs, Tensor[] params, Tensor[] buffers)"
    " -> Tensor[]"
)
FORWARD, BACKWARD = torch.ops.fxzero.island_forward.default, torch.ops.fxzero.island_backward.default
fx.has_side_effect(FORWARD)

_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()


def number(site: Site) -> int:
    """A number for a site, by which the operators know it as long as it lives."""
    index = next(_numbers)
    _sites[index] = site
    return index


@torch.library.register_fake("fxzero::island_forward", lib=_LIBRARY)
def _fake_forward(site: int, again: Any, inputs: Any, params: Any, buffers: Any) -> list[Tensor]:
    """The results; the handle stands for the bytes that the call holds until its backward."""
    facts = _sites[site].facts
    return [torch.empty(facts.held_bytes, dtype=torch.uint8), *(each.empty() for each in facts.outs)]


@torch.library.register_fake("fxzero::island_backward", lib=_LIBRARY)
def _fake_backward(site: int, handle: Any, grads: Any, inputs: Any, params: Any, buffers: Any) -> list[Tensor]:
    return [each.empty() for each in _sites[site].grads]


class IslandFunction(torch.autograd.Function):
    """Gives the node of a forward the node of its backward. Its last arguments are inputs, params and buffers."""

    @staticmethod
    def forward(
        ctx: Any, site: Site, index: int, again: Any, made: list[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, params, buffers = split(site, tensors)
        handle, *outs = FORWARD(index, again, inputs, params, buffers)
        made.append(handle)
        write_buffers(site, buffers, outs)
        fixed = [out for out, geometry in zip(outs, site.facts.outs, strict=False) if not geometry.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)  # None is not zeros: 0 * inf is NaN
        ctx.site, ctx.index, ctx.buffers = site, index, buffers
        kept = [each if i in site.facts.saved_inputs else None for i, each in enumerate(inputs)]
        ctx.save_for_backward(handle, *kept, *params)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        site, (handle, *rest) = ctx.site, ctx.saved_tensors
        inputs, params = rest[: site.num_inputs], rest[site.num_inputs :]
        found = iter(BACKWARD(ctx.index, handle, list(grads), inputs, params, list(ctx.buffers)))
        of_leaves = [next(found) if requires_grad else None for requires_grad in site.requires_grad]
        return (None, None, None, None, *of_leaves, *[None] * len(ctx.buffers))


def split(site: Site, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs, parameters and buffers of a site."""
    begin, end = site.num_inputs, len(site.requires_grad)
    return list(tensors[:begin]), list(tensors[begin:end]), list(tensors[end:])


def write_buffers(site: Site, buffers: Sequence[Tensor], outs: list[Tensor]) -> None:
    """Write the new values of buffers, which are the last results of a forward, and drop them from these."""
    for index in reversed(site.facts.written_buffers):
        buffers[index].copy_(outs.pop())


def bind(graph: fx.Graph) -> None:
    """Let the nodes of islands take their sites, and drop those of recomputations that nothing reads."""
    words = {FORWARD: ops.island_forward, BACKWARD: ops.island_backward}
    for node in list(graph.nodes):
        if node.target in words:
            node.target, node.args = words[node.target], (_sites[cast(int, node.args[0])], *node.args[1:])
