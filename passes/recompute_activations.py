"""Save fewer activations for backward, and compute the rest again there."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from fxzero import ops
from fxzero.ir import Role, StepGraph, info, is_pointwise, is_view, memory_of, role, tensor_bytes
from fxzero.recompute import Copies, choose_saved, read_in_backward
from fxzero.text import block_depth, block_of, format_bytes

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
"""Operators beside pointwise ones and views that take no longer than to read and write their tensors a few times."""

Blocks = frozenset[str]


@dataclass(frozen=True)
class RecomputeActivations:
    """Recompute cheap operators, or whole repeated blocks, in backward, where that saves bytes.

    Before:  h = mm(x, w1) | g = gelu(h) | mm(g, w2) | end_forward | mm(dy, g) | gelu_backward(.., h)
    cheap:   h is saved, g' = gelu(h) stands in front of its reader in backward
    full:    x is saved, h' = mm(x, w1') and g' too; the gather of w1' is that of the block's backward

    What is saved is a minimum cut by bytes. "full" saves what one repeated block (a module in a list) hands to another,
    and recomputes all else inside of it. Random draws, and what is written in place, are saved, never made again. With
    a number of bytes: the first level that saves no more, of cheap in ever more blocks, then full in ever more.

    Needs: RematerializeViews; runs before InsertAllGathers. Numerics: unchanged, bit for bit.
    Source: Chen et al. (arXiv:1604.06174); deviation: chosen by operator in the joint graph, so that recomputation and
    backward share their gathers.
    """

    recompute: Literal["none", "full"] | int = "none"
    """"none", "full", or an upper bound on the bytes saved for backward, per rank."""

    def __post_init__(self) -> None:
        is_bytes = isinstance(self.recompute, int) and not isinstance(self.recompute, bool) and self.recompute >= 0
        if not is_bytes and self.recompute not in ("none", "full"):
            raise ValueError(f'recompute is {self.recompute!r}; it must be "none", "full" or a number of bytes')

    def __call__(self, step: StepGraph, /) -> None:
        if self.recompute == "none" or not step.has_backward:
            return
        depth = block_depth(step.params)
        blocks = list(dict.fromkeys(_block(node, depth) for node in step.nodes(Role.COMPUTE)))
        if self.recompute == "full":
            _apply(step, _Pins(depth, frozenset(blocks), frozenset(blocks)))
        elif saved_bytes(read_in_backward(step)) > self.recompute:
            self._apply_first_that_fits(step, depth, blocks, self.recompute)

    def _apply_first_that_fits(self, step: StepGraph, depth: int, blocks: Sequence[str], limit: int) -> None:
        """Find by bisection how many blocks must be recomputed, and how far."""
        levels = [_Pins(depth, frozenset(blocks[:n]), frozenset()) for n in range(1, len(blocks) + 1)]
        levels += [_Pins(depth, frozenset(blocks), frozenset(blocks[:n])) for n in range(1, len(blocks) + 1)]
        first, last = 0, len(levels) - 1
        while first < last:
            middle = (first + last) // 2
            if saved_bytes(choose_saved(step, levels[middle])[0]) <= limit:
                last = middle
            else:
                first = middle + 1
        saved = saved_bytes(_apply(step, levels[first]))
        if saved > limit:
            logger.warning(
                "recompute=%s: %s are saved for backward even with every block recomputed.",
                format_bytes(limit),
                format_bytes(saved),
            )


def saved_bytes(saved: set[fx.Node]) -> int:
    """Bytes of memory that these values keep alive; views of one memory count it once."""
    return sum(tensor_bytes(memory.meta.get("val")) for memory in {memory_of(node) for node in saved})


def _apply(step: StepGraph, is_pinned: Callable[[fx.Node], bool]) -> set[fx.Node]:
    saved, again = choose_saved(step, is_pinned)
    Copies(step, again).replace_inputs()
    return saved


def _block(node: fx.Node, depth: int) -> str:
    return block_of(info(node).fqn, depth)


@dataclass(frozen=True)
class _Pins:
    """What must not be recomputed: everything in blocks of neither set."""

    depth: int
    cheap: Blocks
    """Blocks whose cheap operators may be recomputed."""
    full: Blocks
    """Blocks that may be recomputed as a whole, if they are repeated: only what they hand to others is pinned."""

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
