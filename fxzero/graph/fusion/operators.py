"""Which operators may stand in a region, which of them are decomposed first, and which never run twice on a CPU."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph.aliasing import is_view, memory_of, written_by
from fxzero.graph.nodes import Role, is_in_place, is_pointwise, is_random
from fxzero.graph.step import StepGraph

aten, prims = torch.ops.aten, torch.ops.prims


def overloads(names: str) -> frozenset[Any]:
    """The overloads of ATen with these names that this version of torch has."""
    found = (torch_internals.overload(aten, name) for name in names.split())
    return frozenset(each for each in found if each is not None)


COMPOSITES = overloads(
    "native_layer_norm.default native_layer_norm_backward.default native_group_norm.default "
    "native_group_norm_backward.default _native_batch_norm_legit_functional.default native_batch_norm_backward.default "
    "_fused_rms_norm.default _fused_rms_norm_backward.default "
    "_softmax.default _safe_softmax.default _softmax_backward_data.default "
    "_log_softmax.default _log_softmax_backward_data.default "
    "nll_loss_forward.default nll_loss_backward.default nll_loss2d_forward.default nll_loss2d_backward.default "
    "mse_loss.default mse_loss_backward.default smooth_l1_loss.default smooth_l1_loss_backward.default "
    "huber_loss.default huber_loss_backward.default binary_cross_entropy_with_logits.default "
    "binary_cross_entropy.default binary_cross_entropy_backward.default "
    "gelu.default gelu_backward.default silu.default silu_backward.default tanh_backward.default "
    "sigmoid_backward.default softplus.default softplus_backward.default mish.default hardswish.default "
    "hardswish_backward.default elu.default elu_backward.default leaky_relu_backward.default "
    "hardtanh_backward.default log_sigmoid_forward.default log_sigmoid_backward.default "
    "addcmul.default addcdiv.default native_dropout_backward.default "
    "zeros_like.default ones_like.default full_like.default new_zeros.default new_ones.default new_full.default"
)
"""Operators that are several pointwise operators and reductions; they are replaced by those."""

REDUCTIONS = overloads(
    "sum.dim_IntList sum.default mean.dim mean.default amax.default amin.default var_mean.correction var.correction "
    "any.default any.dim all.default all.dim argmax.default argmin.default prod.default prod.dim_int"
)
_MADE_OF_NOTHING = overloads(
    "full.default zeros.default ones.default arange.default arange.start arange.start_step scalar_tensor.default"
) | {prims.iota.default}
"""Operators whose result follows from plain numbers: every region that reads one makes it anew."""
_OTHERS = overloads(
    "_to_copy.default clone.default where.self constant_pad_nd.default cat.default stack.default "
    "slice_backward.default select_backward.default slice_scatter.default select_scatter.default "
    "masked_fill.Scalar masked_fill.Tensor tril.default triu.default rsub.Scalar flip.default repeat.default "
    "gather.default scatter.value logical_and.default logical_or.default expand_copy.default copy.default "
    "fill.Scalar threshold_backward.default"
) | {prims.convert_element_type.default}
_COSTLY = overloads(
    "tanh.default log.default log1p.default pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar "
    "softplus.default erfc.default atan2.default atan.default"
)
_LOSSY = overloads(
    "expm1.default atanh.default remainder.Tensor remainder.Scalar remainder.Scalar_Tensor "
    "floor_divide.default floor_divide.Scalar div.Tensor_mode div.Scalar_mode"
)
"""Operators of which Inductor makes others that are far from them: exp(x) - 1, which is 0 where x is small, and
floor(x / y), which may be the next integer."""
MASKS = overloads("bernoulli.p")
"""Draws of zeros and ones."""
_COPIES = overloads("clone.default _to_copy.default copy.default") | {prims.convert_element_type.default}

_DTYPES = frozenset({
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
})  # fmt: skip


def is_made_of_nothing(node: fx.Node) -> bool:
    """True for a constant tensor that an operator makes of plain numbers."""
    return node.target in _MADE_OF_NOTHING and not node.all_input_nodes


def is_reduction(node: fx.Node) -> bool:
    """True for an operator that no region runs a second time: sums and maxima of rows, and copies of several inputs."""
    return node.target in REDUCTIONS or node.target in (aten.cat.default, aten.stack.default)


def is_costly(node: fx.Node) -> bool:
    """True for a function that takes a CPU longer than writing and reading its result: not exp, sin, erf or sigmoid."""
    if node.target is aten.pow.Tensor_Scalar:
        return node.args[1] not in (0.5, 1, 2, 3, -1, -2)
    return node.target in _COSTLY


def is_free(node: fx.Node) -> bool:
    """True for what a region computes itself wherever it reads it: views, and constants made of plain numbers."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    return is_view(node) or is_made_of_nothing(node) or node.target is torch.ops.aten._unsafe_view.default


def _is_faster_alone(node: fx.Node) -> bool:
    """True for tanh of float32 on a CPU: Inductor's takes four times as long as ATen's."""
    value = node.meta["val"]
    return node.target is aten.tanh.default and value.dtype is torch.float32 and value.device.type in ("cpu", "meta")


def _loses_digits(node: fx.Node) -> bool:
    """True for an operator on floating point that is right within rounding only if it runs by itself."""
    return node.target in _LOSSY and node.meta["val"].is_floating_point()


def fusable(step: StepGraph) -> set[fx.Node]:
    """The compute nodes of a step that may stand in regions.

    Left out are draws, operators that write, and whatever reads memory that another operator or the step writes;
    matrix products, convolutions and attention; values that are no plain dense tensors on the device of the step.
    """
    compute = step.nodes(Role.COMPUTE)
    written = {memory_of(target) for node in compute for target in written_by(node)}
    written |= {step.param_nodes()[fqn] for fqn in step.written}
    return {
        node
        for node in compute
        if _may_stand(node)
        and written.isdisjoint(map(memory_of, (node, *node.all_input_nodes)))
        and not _copies_nothing(node)
    }


def _may_stand(node: fx.Node) -> bool:
    if not torch_internals.is_overload(node.target) or is_in_place(node) or is_random(node) or is_free(node):
        return False
    if _loses_digits(node) or _is_faster_alone(node):
        return False
    if not (is_pointwise(node) or is_reduction(node) or node.target in _OTHERS):
        return False
    values: list[Any] = [source.meta.get("val") for source in node.all_input_nodes]
    values += torch_internals.tree_leaves(node.meta.get("val"))
    return all(map(_is_dense, values)) and len({value.device for value in values}) == 1


def _is_dense(value: Any) -> bool:
    """False for numbers of the Python state, lists of tensors, and tensors that a region cannot read."""
    is_tensor = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dtype in _DTYPES
    return is_tensor and value.numel() > 0 and not torch_internals.has_symbolic_shape(value)


def _copies_nothing(node: fx.Node) -> bool:
    """True for a copy with the geometry of its source, which a compiler leaves out: two results would share memory."""
    if node.target not in _COPIES or not node.all_input_nodes:
        return False
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return (before.dtype, before.stride(), before.shape) == (after.dtype, after.stride(), after.shape)
