"""A cross entropy of a linear layer's logits in a step: found with its backward, and written anew in chunks of rows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph.aliasing import is_view, memory_of, written_by
from fxzero.graph.nodes import META_KEY, NodeInfo, Role, info, new_value
from fxzero.graph.step import StepGraph

aten = torch.ops.aten

_NO_LABEL = -100


@dataclass(frozen=True)
class _Sink:
    """What reads the gradient of logits."""

    node: fx.Node
    casts: tuple[fx.Node, ...]
    """Casts on the way to it."""
    kind: str
    """"rows": a product with the gradient on the left; "left", "right": a product that sums over rows, with the
    gradient on this side; "sum": a sum over rows."""


@dataclass(frozen=True)
class ChunkableLoss:
    """The nodes of a cross entropy and of its backward."""

    product: fx.Node
    casts: tuple[fx.Node, ...]
    """Casts from the product to the log-softmax."""
    softmax: fx.Node
    nll: fx.Node
    nll_backward: fx.Node
    softmax_backward: fx.Node
    sinks: list[_Sink] = field(default_factory=list[_Sink])


# -- finding -----------------------------------------------------------------------------------------------------------


def find_losses(step: StepGraph) -> list[ChunkableLoss]:
    """The losses of a step that can be computed in chunks of rows."""
    softmaxes = step.graph.find_nodes(op="call_function", target=aten._log_softmax.default)
    found = [loss for node in softmaxes if (loss := _find(node)) is not None]
    return [loss for loss in found if _has_rows(loss) and not _is_overwritten(step, loss.product)]


def _has_rows(loss: ChunkableLoss) -> bool:
    """True if there are rows, and one bias for all of them."""
    logits, *read = (node.meta["val"] for node in (loss.product, *loss.product.all_input_nodes))
    has_bias_of_rows = loss.product.target is aten.addmm.default and read[0].dim() > 1
    return logits.shape[0] > 0 and not has_bias_of_rows


def _is_overwritten(step: StepGraph, product: fx.Node) -> bool:
    """True if the step writes to what a product reads, behind it: the product cannot run there."""
    written = {step.param_nodes()[fqn] for fqn in step.written}
    writers = [node for node in step.nodes(Role.COMPUTE) if product < node]
    written |= {memory_of(target) for node in writers for target in written_by(node)}
    return not written.isdisjoint(map(memory_of, product.all_input_nodes))


def _find(softmax: fx.Node) -> ChunkableLoss | None:
    """The loss that a log-softmax belongs to; None for one that is not all of this form."""
    product, casts = _product_of(softmax)
    users = {user.target: user for user in softmax.users}
    targets = (aten.nll_loss_forward.default, aten.nll_loss_backward.default, aten._log_softmax_backward_data.default)
    if product is None or len(softmax.users) != 3 or set(users) != set(targets):
        return None
    nll, nll_backward, softmax_backward = (users[target] for target in targets)
    _, _, weight, reduction, _ = nll.args
    is_right = weight is None and reduction in (1, 2) and softmax_backward.args[0] is nll_backward
    if not is_right or set(nll_backward.users) != {softmax_backward}:
        return None
    sinks = list(_sinks(softmax_backward, softmax.meta["val"].shape, (), False))
    if not sinks or None in sinks:
        return None
    return ChunkableLoss(product, casts, softmax, nll, nll_backward, softmax_backward, cast("list[_Sink]", sinks))


def _product_of(softmax: fx.Node) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """The product of rows that a log-softmax of the last dimension is taken of, and casts between the two."""
    value: torch.Tensor = softmax.meta["val"]
    if value.dim() != 2 or softmax.args[1] not in (1, -1):
        return None, ()
    casts: list[fx.Node] = []
    node = cast(fx.Node, softmax.args[0])
    while node.target not in (aten.mm.default, aten.addmm.default):
        if not _keeps_rows(node, value.shape[-1]):
            return None, ()
        if not _is_reshape(node):
            casts.insert(0, node)
        node = cast(fx.Node, node.args[0])
    is_whole = node.meta["val"].shape == value.shape and not node.kwargs
    return (node if is_whole else None), tuple(casts)


def _is_reshape(node: fx.Node) -> bool:
    return node.target in (aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default)


def _keeps_rows(node: fx.Node, width: int) -> bool:
    """True for a reshape of rows, or a cast."""
    if node.target is aten._to_copy.default:
        before, after = cast(fx.Node, node.args[0]).meta["val"], node.meta["val"]
        return (before.device, before.layout) == (after.device, after.layout)
    return _is_reshape(node) and node.meta["val"].shape[-1] == width


def _sinks(node: fx.Node, shape: torch.Size, casts: tuple[fx.Node, ...], is_turned: bool) -> Iterator[_Sink | None]:
    """All that reads the gradient of logits, through casts and views; None for what cannot be split."""
    for user in node.users:
        if user.target is aten.t.default:
            yield from _sinks(user, shape, casts, not is_turned)
        elif not is_turned and _keeps_rows(user, shape[-1]):
            more = () if _is_reshape(user) else (user,)
            yield from _sinks(user, shape, (*casts, *more), False)
        elif user.target is aten.mm.default and user.args[0] is not user.args[1] and node.meta["val"].dim() == 2:
            if user.args[0] is node:
                yield _Sink(user, casts, "left" if is_turned else "rows")
            else:
                yield None if is_turned else _Sink(user, casts, "right")
        elif user.target is aten.sum.dim_IntList and user.args[1] == [0] and not is_turned and not user.kwargs:
            yield _Sink(user, casts, "sum") if node.meta["val"].shape == shape else None
        else:
            yield None


# -- rewriting ---------------------------------------------------------------------------------------------------------


def write_chunks(step: StepGraph, loss: ChunkableLoss, num_chunks: int) -> None:
    """Compute a loss, and the gradients of the layer that it is of, chunk by chunk, in place."""
    _Rewriter(step, loss, num_chunks).rewrite()


class _Rewriter:
    """Writes the chunks of one loss."""

    def __init__(self, step: StepGraph, loss: ChunkableLoss, num_chunks: int) -> None:
        self._graph, self._loss = step.graph, loss
        num_rows = loss.softmax.meta["val"].shape[0]
        size = -(-num_rows // num_chunks)
        self._chunks = [(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]
        self._fqn = info(loss.product).fqn
        self._is_read = _is_read_elsewhere(loss)

    def rewrite(self) -> None:
        """Replace the nodes of the loss; what nothing reads any more is erased."""
        loss = self._loss
        self._place = loss.nll
        results = self._forward()
        for index, result in enumerate(results):
            for taken in [user for user in loss.nll.users if user.args[1] == index]:
                taken.replace_all_uses_with(result)
        self._place = loss.softmax_backward
        self._backward(results[1])
        self._erase([*loss.nll.users, *(sink.node for sink in loss.sinks)])

    def _forward(self) -> list[fx.Node]:
        """Loss and number of labels, of the labels' entries alone."""
        _, labels, weight, reduction, ignored = self._loss.nll.args
        counts = self._add(aten.ne.Scalar, labels, ignored)
        zero = self._add(aten.zeros_like.default, labels)
        index = self._add(aten.where.self, counts, labels, zero)
        index = self._add(aten.unsqueeze.default, index, 1)
        entries: list[fx.Node] = []
        for chunk in self._chunks:
            softmax = self._softmax(chunk, again=False)
            entries.append(self._add(aten.gather.default, softmax, 1, self._rows(index, chunk)))
        all_entries = self._add(aten.cat.default, entries)
        none = self._add(aten.full_like.default, labels, _NO_LABEL)
        only = self._add(aten.where.self, counts, zero, none)
        nll = self._add(aten.nll_loss_forward.default, all_entries, only, weight, reduction, _NO_LABEL)
        return [self._add(operator.getitem, nll, index) for index in range(2)]

    def _backward(self, total: fx.Node) -> None:
        loss = self._loss
        parts: list[list[fx.Node]] = [[] for _ in loss.sinks]
        for chunk in self._chunks:
            softmax = self._softmax(chunk, again=True)
            tangent, _, labels, weight, reduction, ignored, _ = loss.nll_backward.args
            args = (tangent, softmax, self._rows(labels, chunk), weight, reduction, ignored, total)
            grad = self._add(aten.nll_loss_backward.default, *args)
            _, _, dim, dtype = loss.softmax_backward.args
            grad = self._add(aten._log_softmax_backward_data.default, grad, softmax, dim, dtype)
            for sink, made in zip(loss.sinks, parts, strict=True):
                part = self._part(sink, self._cast(grad, sink.casts), chunk)
                if sink.kind == "rows" or not made:
                    made.append(part)
                else:
                    made[0] = self._add(aten.add.Tensor, made[0], part)
        for sink, made in zip(loss.sinks, parts, strict=True):
            whole = self._add(aten.cat.default, made) if sink.kind == "rows" else made[0]
            sink.node.replace_all_uses_with(whole)

    def _part(self, sink: _Sink, grad: fx.Node, chunk: tuple[int, int]) -> fx.Node:
        """What one chunk adds to the result of a reader of the gradient."""
        first, second = sink.node.args[:2]
        if sink.kind == "rows":
            return self._add(aten.mm.default, grad, self._moved(second))
        if sink.kind == "left":
            turned = self._add(aten.t.default, grad)
            return self._add(aten.mm.default, turned, self._rows(self._moved(second), chunk))
        if sink.kind == "right":
            return self._add(aten.mm.default, self._rows(self._moved(first), chunk, 1), grad)
        return self._add(aten.sum.dim_IntList, grad, *sink.node.args[1:])

    def _softmax(self, chunk: tuple[int, int], *, again: bool) -> fx.Node:
        """The log-softmax of a chunk of rows."""
        product = self._loss.product
        if self._is_read and not again:
            logits = self._rows(product, chunk)
        elif product.target is aten.mm.default:
            rows, weight = product.args
            logits = self._add(aten.mm.default, self._rows(rows, chunk), weight)
        else:
            bias, rows, weight = product.args
            logits = self._add(aten.addmm.default, bias, self._rows(rows, chunk), weight)
        _, dim, half_to_float = self._loss.softmax.args
        return self._add(aten._log_softmax.default, self._cast(logits, self._loss.casts), dim, half_to_float)

    def _cast(self, node: fx.Node, casts: Sequence[fx.Node]) -> fx.Node:
        for each in casts:
            node = self._add(each.target, node, **each.kwargs)
        return node

    def _rows(self, node: Any, chunk: tuple[int, int], dim: int = 0) -> fx.Node:
        return self._add(aten.slice.Tensor, node, dim, *chunk)

    def _moved(self, node: Any) -> fx.Node:
        """A view that stands behind the place where it is read now is made anew."""
        if not is_view(node) or node < self._place:
            return node
        args = tuple(self._moved(each) if isinstance(each, fx.Node) else each for each in node.args)
        return self._add(node.target, *args, **node.kwargs)

    def _add(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(self._place):
            node = self._graph.call_function(cast("Callable[..., Any]", target), args, kwargs)
        new_value(node, torch_internals.fake_result(node))
        node.meta[META_KEY] = NodeInfo(Role.COMPUTE, self._fqn)
        if "stack_trace" in self._loss.nll.meta:
            node.meta["stack_trace"] = self._loss.nll.meta["stack_trace"]
        return node

    def _erase(self, nodes: Sequence[fx.Node]) -> None:
        """Erase nodes that nothing reads, and what they alone read of the loss."""
        waiting, erased = list(nodes), set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node.op == "call_function" and node not in erased and not node.users:
                waiting += node.all_input_nodes
                self._graph.erase_node(node)
                erased.add(node)


def _is_read_elsewhere(loss: ChunkableLoss) -> bool:
    """True if the logits have readers beside the loss, as where forward returns them."""
    on_the_way = {loss.softmax}
    node = cast(fx.Node, loss.softmax.args[0])
    while True:
        if not on_the_way.issuperset(node.users):
            return True
        if node is loss.product:
            return False
        on_the_way.add(node)
        node = cast(fx.Node, node.args[0])
