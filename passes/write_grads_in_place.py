"""Compute gradients directly in their bucket."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import fx

from fxzero.errors import PassOrderError
from fxzero.graph import ops
from fxzero.graph.aliasing import is_view
from fxzero.graph.nodes import NodeInfo, Role, grad_fqn, grad_of, info, new_value
from fxzero.graph.regions import give_place, is_region
from fxzero.graph.step import StepGraph

aten = torch.ops.aten

_OUT_VARIANTS: dict[Any, Any] = {
    aten.mm.default: aten.mm.out,
    aten.bmm.default: aten.bmm.out,
    aten.addmm.default: aten.addmm.out,
    aten.add.Tensor: aten.add.out,
    aten.sum.dim_IntList: aten.sum.IntList_out,
}
"""Maps operators to their `out=` forms that write in place; `out=` of layer-norm backward, say, copies inside."""

_HALF = (torch.bfloat16, torch.float16)

Writer: TypeAlias = Callable[[StepGraph, fx.Node, fx.Node], fx.Node]
"""A function of a step, the producer of a gradient and a slot; it returns a node that computes into the slot."""


def _producer(slot: fx.Node) -> fx.Node | None:
    """The node that computes the gradient of a write_grad, if only reshapes lie between and nothing else reads them."""
    node = grad_of(slot)
    while node is not None and len(node.users) == 1:
        reshapes = is_view(node) and node.target in (aten.view.default, aten.unsqueeze.default, aten.squeeze.dim)
        if not (reshapes or node.target is aten._unsafe_view.default):
            return node
        node = cast(fx.Node, node.args[0])
    return None


@dataclass(frozen=True)
class WriteGradsInPlace:
    """Let the operator that produces a gradient write to its slot of the bucket, instead of copying it there.

    Before:  dw = mm(x, dy) | write_grad dw                dw = embedding_dense_backward(dy, ids) | write_grad dw
    After:   mm.out(x, dy, out=slot) | write_grad          zero_(slot) | index_add_(slot, ids, dy) | write_grad

    This covers mm, addmm, bmm, add (the last addition of a tied weight's gradients), sum, and results of regions, also
    behind reshapes.
    Gradients of other operators are copied once; `zero.schedule` counts these bytes. Under no_sync() all are copied.

    Needs: InsertReduceScatters. Numerics: unchanged, bit for bit.
    Source: Megatron-LM's gradient accumulation fusion, whose fused kernel writes weight gradients to their bucket;
    deviation: operators' own `out=` forms, and never `beta=1`, which is not bitwise.
    """

    def __call__(self, step: StepGraph, /) -> None:
        if not step.has_backward or not step.synchronize:
            return
        slots = step.nodes(Role.WRITE_GRAD)
        if not slots and step.grads:
            raise PassOrderError("no write_grad in the graph; run InsertReduceScatters first")
        for slot in slots:
            producer = _producer(slot)
            if producer is not None and (write := self._writer(producer, step, grad_fqn(slot))):
                self._replace(step, slot, producer, write)

    def _writer(self, producer: fx.Node, step: StepGraph, fqn: str) -> Writer | None:
        """The function that lets the producer write to a slot; None if there is none."""
        value = producer.meta["val"]
        if value.dtype != step.params[fqn].dtypes.grad or not value.is_contiguous():
            return None
        if producer.target in _OUT_VARIANTS and "dtype" not in producer.kwargs:
            return _compute_into
        if producer.target is operator.getitem and is_region(cast(fx.Node, producer.args[0])):
            return _give_place
        if producer.target is aten.embedding_dense_backward.default and value.device.type == "cpu":
            scale_by_frequency, is_half = producer.args[4], value.dtype in _HALF  # index_add rounds halves otherwise
            return None if scale_by_frequency or is_half else _add_rows_into
        return None

    def _replace(self, step: StepGraph, slot: fx.Node, producer: fx.Node, write: Writer) -> None:
        with step.graph.inserting_before(producer):
            memory = step.graph.call_function(ops.grad_slot, (grad_fqn(slot), tuple(producer.meta["val"].shape)))
            new_value(memory, producer.meta["val"])
            written = write(step, producer, memory)
        between = cast(fx.Node, grad_of(slot))
        slot.args = (written, grad_fqn(slot))
        while between is not producer:
            unused, between = between, cast(fx.Node, between.args[0])
            step.graph.erase_node(unused)
        if written is memory:
            give_place(producer, memory)
        else:
            step.graph.erase_node(producer)


def _compute_into(step: StepGraph, producer: fx.Node, memory: fx.Node) -> fx.Node:
    """The producer's operator with `out=`."""
    target = _OUT_VARIANTS[producer.target]
    written = step.graph.call_function(target, producer.args, {**producer.kwargs, "out": memory})
    written.meta = dict(producer.meta)
    return written


def _give_place(step: StepGraph, producer: fx.Node, memory: fx.Node) -> fx.Node:
    """A region writes its result to the slot itself; nothing computes the slot's value behind it."""
    cast(fx.Node, producer.args[0]).prepend(memory)
    return memory


def _add_rows_into(step: StepGraph, producer: fx.Node, memory: fx.Node) -> fx.Node:
    """Embedding backward: fill with zeros, then add each row of the gradient to the row of its index, in order."""
    grad, indices, _, padding_index, _ = cast("tuple[fx.Node, fx.Node, int, int, bool]", producer.args)
    width = memory.meta["val"].shape[-1]

    def compute(target: Any, *args: Any) -> fx.Node:
        node = step.graph.call_function(target, args)
        node.meta["fxzero"] = NodeInfo(Role.COMPUTE, info(producer).fqn)
        return new_value(node, memory.meta["val"])

    compute(aten.zero_.default, memory)
    rows = compute(aten.reshape.default, grad, [-1, width])
    flat = compute(aten.reshape.default, indices, [-1])
    written = compute(aten.index_add_.default, memory, 0, flat, rows)
    if padding_index >= 0:
        compute(aten.zero_.default, compute(aten.select.int, memory, 0, padding_index))
    return written
