"""Save fewer activations for backward, and compute the others again there."""

from __future__ import annotations

import bisect
import logging
import operator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from fxzero.graph import ops
from fxzero.graph.aliasing import is_view, memory_of
from fxzero.graph.min_cut import Copies, choose_saved, read_in_backward
from fxzero.graph.names import block_depth, block_of, format_bytes
from fxzero.graph.nodes import Role, info, is_pointwise, role, tensor_bytes
from fxzero.graph.recipe import check_recompute
from fxzero.graph.step import StepGraph

logger = logging.getLogger(__name__)
aten = torch.ops.aten

_CHEAP = {
    aten._unsafe_view.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.cat.default,
    aten.embedding.default,
    aten.expand.default,
    aten.native_layer_norm.default,
    aten._softmax.default,
    aten._log_softmax.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
}
"""Operators, beside pointwise ones and views, whose time is that of a few reads and writes of their tensors."""

Blocks = frozenset[str]


@dataclass(frozen=True)
class RecomputeActivations:
    """Recompute cheap operators, or whole repeated blocks, in backward, if that saves bytes.

    Before:  h = mm(x, w1) | g = gelu(h) | mm(g, w2) | end_forward | mm(dy, g) | gelu_backward(.., h)
    cheap:   h is saved, g' = gelu(h) stands in front of its reader in backward
    full:    x is saved, h' = mm(x, w1') and g' too; the gather of w1' is that of the block's backward

    The saved values are a minimum cut by bytes. "full" saves values that one repeated block (a module in a list) hands
    to another, and recomputes all others in the block. Random draws and results of in-place writes are always saved. A
    number of bytes selects the first level that saves no more: cheap in ever more blocks, then full in ever more.

    Needs: RematerializeViews; runs before InsertAllGathers. Numerics: unchanged, bit for bit.
    Source: Chen et al. (arXiv:1604.06174); deviation: chosen by operator in the joint graph, so that recomputation and
    backward share their gathers.
    """

    recompute: Literal["none", "full"] | int = "none"
    """"none", "full", or an upper bound on the bytes saved for backward, per rank."""
    level: int | None = None
    """Level of recomputation, once it is chosen; see `level_for`."""

    def __post_init__(self) -> None:
        check_recompute(self.recompute)

    def __call__(self, step: StepGraph, /) -> None:
        level = self.level_for(step) if self.level is None else self.level
        if not step.has_backward or level == 0:
            return
        levels = _levels(step)
        _, again = choose_saved(step, levels[min(level, len(levels)) - 1])
        Copies(step, again).replace_inputs()

    def level_for(self, step: StepGraph) -> int:
        """The level that this step needs: 0 for nothing, then cheap in 1, 2, ... blocks, then full in 1, 2, ...

        The level is chosen for the input shapes of this step; larger inputs save more bytes at an equal level.
        """
        if self.recompute == "none" or not step.has_backward:
            return 0
        levels = _levels(step)
        if self.recompute == "full":
            return len(levels)
        if _memory_bytes(read_in_backward(step)) <= self.recompute:
            return 0
        budget = self.recompute

        def saved_bytes(pins: _Pins) -> int:
            return _memory_bytes(choose_saved(step, pins)[0])

        index = bisect.bisect_left(levels, True, hi=len(levels) - 1, key=lambda pins: saved_bytes(pins) <= budget)
        if (saved := saved_bytes(levels[index])) > budget:
            message = "recompute=%s: %s are saved for backward even with every block recomputed."
            logger.warning(message, format_bytes(budget), format_bytes(saved))
        return index + 1


def _levels(step: StepGraph) -> list[_Pins]:
    """The pins of each level from 1 on."""
    depth = block_depth(step.params)
    blocks = list(dict.fromkeys(_block(node, depth) for node in step.nodes(Role.COMPUTE)))
    every, none = frozenset(blocks), frozenset[str]()
    cheap = [_Pins(depth, frozenset(blocks[:number]), none) for number in range(1, len(blocks) + 1)]
    return cheap + [_Pins(depth, every, frozenset(blocks[:number])) for number in range(1, len(blocks) + 1)]


def _memory_bytes(saved: set[fx.Node]) -> int:
    """Bytes of memory that the values keep alive; views of one memory count once."""
    return sum(tensor_bytes(memory.meta.get("val")) for memory in {memory_of(node) for node in saved})


def _block(node: fx.Node, depth: int) -> str:
    return block_of(info(node).fqn, depth)


@dataclass(frozen=True)
class _Pins:
    """Selects nodes that must not be recomputed: all in blocks of neither set, some in others."""

    depth: int
    cheap: Blocks
    """Blocks whose cheap operators may be recomputed."""
    full: Blocks
    """Repeated blocks that may be recomputed as a whole: only values that they hand to others are pinned."""

    def __call__(self, node: fx.Node) -> bool:
        block = _block(node, self.depth)
        if block in self.full and block.rsplit(".", 1)[-1].isdigit():
            return any(_block(user, self.depth) != block for user in _forward_users(node))
        return block not in self.cheap or not _is_cheap(node)


def _forward_users(node: fx.Node) -> list[fx.Node]:
    (boundary,) = node.graph.find_nodes(op="call_function", target=ops.end_forward)
    return [user for user in node.users if user < boundary and role(user) is Role.COMPUTE]


def _is_cheap(node: fx.Node) -> bool:
    takes_one_output = node.target is operator.getitem
    return takes_one_output or is_pointwise(node) or is_view(node) or node.target in _CHEAP
