"""Turn optimizations off, so that what each is worth can be measured: one alone, several, or all.

    fxzero.compile(model, without=["prefetch", "buckets"])
    fxzero.compile(model, without="all")    # gather each parameter where it is used, and wait

What made ZeRO-3 fast on a slow network in 2022, at run time, and what turns off its counterpart here:

    1  collectives overlap compute                      overlap
    2  decisions ahead of the step: what is used next   prefetch (a generated step decides nothing itself)
    3  batched collectives, interleaved by copies       buckets; layout (here batches need no copies)
    4  collectives of flat tensors                      flat_collectives
    5  state in contiguous buffers                      persistent_buffers
    6  gradient norm without host synchronisation       fused_norm
    7  no norms computed for debug messages             (nothing to turn off)

Training stays the same bit for bit, with two exceptions: without flat_collectives, on gloo, gradients of three ranks or
more are added in gloo's order; without fused_norm, the norm that gradients are clipped by is rounded in another way.

Each is turned off where it is chosen, once: in the list of passes, the layout, the collectives, the memory that buffers
are bound to, the function that clips. A step has no switch in it.

Source: "Making DeepSpeed ZeRO run efficiently on more-affordable hardware" (Amazon Science, 2022), DeepSpeed PR 1453.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from fxzero.comm.base import Comm
from fxzero.graph.recipe import Recipe
from fxzero.reference.grad_norm_by_parameter import clip_each_grad_norm_
from fxzero.reference.tensor_lists import with_tensor_lists
from fxzero.reference.transient import TransientBinder
from fxzero.runtime.binding import Binder
from fxzero.runtime.clip import clip_grad_norm_
from fxzero.runtime.gradients import Gradients

Optimization: TypeAlias = Literal[
    "overlap", "prefetch", "buckets", "layout", "flat_collectives", "persistent_buffers", "fused_norm"
]
Without: TypeAlias = Sequence[Optimization] | Optimization | Literal["all"]


@dataclass(frozen=True)
class Effect:
    """What turning an optimization off does."""

    row: int
    """Its number in the list above."""
    text: str


OPTIMIZATIONS: dict[Optimization, Effect] = {
    "overlap": Effect(
        1, "each collective is waited for where it starts, a gather at the first use; no prefetch either"
    ),
    "prefetch": Effect(2, "a gather starts at the first use of its bucket"),
    "buckets": Effect(3, "one collective for each parameter"),
    "layout": Effect(3, 'what a bucket sends and receives is interleaved by copies: layout="interleaved"'),
    "flat_collectives": Effect(
        4, "all_gather and reduce_scatter of lists of tensors; gloo then sends a reduce-scatter's bytes twice"
    ),
    "persistent_buffers": Effect(
        5, "buffers of collectives and temporaries are allocated at each use, not planned in an arena; shards stay"
    ),
    "fused_norm": Effect(6, "clip_grad_norm_ goes from parameter to parameter, and the host reads each norm"),
}
"""By name, in the order in which they are listed."""

Clip: TypeAlias = Callable[[Gradients | None, Comm, float, float, bool], torch.Tensor]


def names(without: Without) -> tuple[Optimization, ...]:
    """What a user asks to turn off, each once, in the order of `OPTIMIZATIONS`.

    Raises:
        ValueError: there is no such optimization.
    """
    if without == "all":
        return tuple(OPTIMIZATIONS)
    given: Iterable[str] = (without,) if isinstance(without, str) else without
    if unknown := [name for name in given if name not in OPTIMIZATIONS]:
        raise ValueError(f'without has {unknown[0]!r}; it must be "all", or of: {", ".join(OPTIMIZATIONS)}.')
    return tuple(name for name in OPTIMIZATIONS if name in given)


def scheduled(without: Iterable[str]) -> list[str]:
    """Those that are passes, or options of one."""
    return [name for name in without if name in ("overlap", "prefetch", "buckets")]


def recipe_without(without: Sequence[str], recipe: Recipe) -> Recipe:
    """The recipe of plans that leave optimizations out.

    A bucket of a single parameter is cut alike in both layouts, and has nothing to interleave.
    """
    recipe = replace(recipe, without=tuple(without))
    if "buckets" in without:
        return replace(recipe, bucket_bytes=1)
    return replace(recipe, layout="interleaved") if "layout" in without else recipe


def binder_without(without: Sequence[str]) -> type[Binder]:
    """What binds a plan to memory."""
    return TransientBinder if "persistent_buffers" in without else Binder


def comm_without(without: Sequence[str], comm: Comm) -> Comm:
    """The collectives of a group of ranks.

    Raises:
        ValueError: those have no form for lists of tensors.
    """
    return with_tensor_lists(comm) if "flat_collectives" in without else comm


def clip_without(without: Sequence[str]) -> Clip:
    """What clips gradients by their norm."""
    return clip_each_grad_norm_ if "fused_norm" in without else clip_grad_norm_


__all__ = ["OPTIMIZATIONS", "Effect", "Optimization"]
