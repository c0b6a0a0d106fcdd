"""The two operators that stand for an island in a trace, and the autograd Function that joins them.

A traced graph has their overloads, with the number of a site. `bind` replaces them by `ops.island_forward` and
`ops.island_backward`, which take the site itself; no step calls an overload.
"""

import itertools
import operator
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxzero.capture.islands.site import Site
from fxzero.errors import CaptureError
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


def _fake_forward(site: int, again: Any, inputs: Any, params: Any, buffers: Any) -> list[Tensor]:
    """The results; the handle stands for the bytes that the call holds until its backward."""
    facts = _sites[site].facts
    return [torch.empty(facts.held_bytes, dtype=torch.uint8), *(each.empty() for each in facts.outs)]


def _fake_backward(site: int, handle: Any, grads: Any, inputs: Any, params: Any, buffers: Any) -> list[Tensor]:
    written = [buffers[index] for index in _sites[site].facts.written_in_backward]
    return [*(each.empty() for each in _sites[site].grads), *map(torch.empty_like, written)]


torch.library.register_fake("fxzero::island_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("fxzero::island_backward", _fake_backward, lib=_LIBRARY)


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
        for buffer in site.facts.written_in_backward:
            ctx.buffers[buffer].copy_(next(found))
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
    """Let the nodes of islands take their sites.

    Raises:
        CaptureError: an island would cast a weight under autocast for itself, where eager casts it once for several.
    """
    backwards: list[fx.Node] = []
    for node in graph.nodes:
        if node.target is FORWARD:
            node.target, node.args = ops.island_forward, (_sites[cast(int, node.args[0])], *node.args[1:])
        elif node.target is BACKWARD:
            site = _sites[cast(int, node.args[0])]
            node.target, node.args = ops.island_backward, (site, *node.args[1:], [None] * len(site.grads))
            backwards.append(node)
    _check_casts(graph, backwards)
    for node in backwards:
        _add_inside(graph, node)


def _check_casts(graph: fx.Graph, backwards: Sequence[fx.Node]) -> None:
    """Eager's gradients of one cast are added in the dtype of the cast, those of several in that of the weight."""
    for param in graph.find_nodes(op="placeholder"):
        readers = [(cast(Site, node.args[0]), cast("list[fx.Node]", node.args[4])) for node in backwards]
        around = [(site, params.index(param)) for site, params in readers if param in params]
        casts = [site for site, index in around if site.casts(index)]
        others = [user for user in param.users if user.target not in (ops.island_forward, ops.island_backward)]
        if casts and (len(around) > 1 or others):
            raise CaptureError(
                "autocast casts a weight of it once, also for readers outside, whose gradients are added as they are",
                casts[0].fqn,
            )


def _add_inside(graph: fx.Graph, backward: fx.Node) -> None:
    """Let a sum of an island's gradient and an older one begin with the older one, as autograd adds them in eager.

    Before:  g = island_backward(..)[0] | add(older, g)        After:  g = island_backward(.., sums=[older])[0]
    """
    sums = list(cast("list[Any]", backward.args[-1]))
    for gradient in [user for user in backward.users if user.target is operator.getitem]:
        adds = [user for user in gradient.users if user.target is torch.ops.aten.add.Tensor and not user.kwargs]
        if len(gradient.users) != 1 or not adds:
            continue
        others = [each for each in adds[0].args if each is not gradient]
        older = others[0] if len(others) == 1 else None
        if isinstance(older, fx.Node) and older < backward and _is_alike(older, gradient) and _is_alike(adds[0], older):
            index = cast(int, gradient.args[1])
            sums[index] = older
            gradient.meta["val"] = adds[0].meta["val"]
            cast(Site, backward.args[0]).declare_sum(index, gradient.meta["val"])
            adds[0].replace_all_uses_with(gradient)
            graph.erase_node(adds[0])
    backward.args = (*backward.args[:-1], sums)


def _is_alike(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta["val"], b.meta["val"]
    return (left.shape, left.dtype) == (right.shape, right.dtype)
