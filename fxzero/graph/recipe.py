"""The recipe of a model's plans: all that is chosen about them, in one value.

options -> sizes and order from costs -> buckets that stay gathered under a memory budget -> the buckets of the layout
           (each step maps a Recipe to a Recipe, equal on all ranks)           -> default_passes(recipe) -> passes

A Recipe alone carries decisions from one step to the next: no list of passes is searched or patched.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from fxzero.graph.layout import LayoutName, check_layout
from fxzero.graph.wire import check_gather_dtype, check_reduce_dtype

MIB = 2**20
Fqns: TypeAlias = tuple[str, ...]
"""Names of the members of a bucket."""


Compute: TypeAlias = Literal["eager", "exact", "fused"]
"""How operators run: each by itself, or fused in compiled regions: "exact" for those alone that keep every bit."""


class Need(NamedTuple):
    """A parameter that is gathered, or whose gradient is reduced, in one phase of a step."""

    phase: str
    role: str
    fqn: str

    def __str__(self) -> str:
        return f"{self.role} of {self.fqn} in {self.phase}"


Needs: TypeAlias = tuple[Need, ...]


@dataclass(frozen=True)
class Recipe:
    """All that is chosen about the plans of one model."""

    layout: LayoutName = "contiguous"
    """Name of the layout by which a bucket is cut into shards."""
    bucket_bytes: int = 16 * MIB
    """Upper bound on the parameter bytes of one bucket; a larger parameter is a bucket of its own."""
    head_bytes: int | None = None
    """Upper bound on the first bucket; each later bucket may be twice as large. None: `bucket_bytes` for all."""
    buckets: tuple[Fqns, ...] | None = None
    """Members of each bucket, once the layout is fixed."""
    max_kept_bytes: int | None = 0
    """Upper bound on the bytes that stay gathered from forward to backward: 0 gathers all again (ZeRO stage 3), None
    keeps all (the residency of stage 2)."""
    kept: tuple[Fqns, ...] | None = None
    """Buckets that stay gathered from forward to backward. None leaves the choice to `max_kept_bytes`."""
    resident: tuple[Fqns, ...] = ()
    """Buckets that stay gathered even longer, until the shards change."""
    prefetch_bytes: int = 48 * MIB
    """Upper bound on gathered bytes in flight."""
    reduce_bytes: int = 48 * MIB
    """Upper bound on the bytes of gradient buckets in flight."""
    is_tight: bool = False
    """True if `prefetch_bytes` and `reduce_bytes` count as 0: one gather ahead, and one reduction in flight."""
    later: tuple[tuple[Fqns, Fqns], ...] = ()
    """Pairs of buckets: the reduction of the first starts right behind the gather of the second (`GathersFirst`)."""
    recompute: Literal["none", "full"] | int = "none"
    """Recomputation of activations in backward: "none", "full" (repeated blocks), or an upper bound on saved bytes."""
    recompute_level: int | None = None
    """Level of recomputation, once it is chosen (`RecomputeActivations.level_for`)."""
    compute: Compute = "eager"
    """"fused", "exact": what runs between matrix products is compiled, region by region (`FuseCompute`)."""
    loss_chunks: int = 1
    """Chunks of rows in which a head and its cross entropy are computed (`ChunkLoss`); 1 for whole logits."""
    needs: Needs = ()
    """Gathers and reductions that ranks need together, where this rank lacks some (`CompleteCollectives`)."""
    gather_dtype: torch.dtype | None = None
    """Dtype in which parameters travel; None for their own."""
    reduce_dtype: torch.dtype | None = None
    """Dtype in which gradients travel; None for their own."""
    accumulate: int = 1
    """Micro-batches of one step of the optimizer, if all but the last need not reduce their gradients."""
    unsharded: bool | None = None
    """True if gradients of micro-batches are added up unsharded and reduced once, False if each micro-batch reduces
    them into the shards. None leaves the choice to costs or a memory budget, and means True without them."""
    without: tuple[str, ...] = ()
    """Optimizations that are left out, to measure their effect (`reference/ablation.py`)."""

    def __post_init__(self) -> None:
        check_layout(self.layout)
        check_recompute(self.recompute)
        check_accumulate(self.accumulate)
        if self.compute not in ("eager", "exact", "fused"):
            raise ValueError(f'compute is {self.compute!r}; it must be "eager", "exact" or "fused"')
        check_loss_chunks(self.loss_chunks)
        if self.gather_dtype is not None:
            check_gather_dtype(self.gather_dtype)
        if self.reduce_dtype is not None:
            check_reduce_dtype(self.reduce_dtype)

    @property
    def is_persistent(self) -> bool:
        """False if buffers are allocated at each use instead of in one arena."""
        return "persistent_buffers" not in self.without

    @property
    def keeps_unsharded(self) -> bool:
        """True if only every `accumulate`-th backward reduces gradients."""
        return self.accumulate > 1 and self.unsharded is not False

    def to_json(self) -> str:
        """The recipe as one line of JSON; equal recipes give equal lines."""
        fields = dataclasses.asdict(self)
        for name in ("gather_dtype", "reduce_dtype"):
            fields[name] = None if fields[name] is None else str(fields[name]).removeprefix("torch.")
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Recipe:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {name: _tuples(value) for name, value in json.loads(line).items()}
        for name in ("gather_dtype", "reduce_dtype"):
            fields[name] = None if fields[name] is None else getattr(torch, fields[name])
        fields["needs"] = tuple(Need(*need) for need in fields.get("needs", ()))
        return cls(**fields)


def check_recompute(recompute: object) -> None:
    """Raise ValueError if `recompute` is not "none", "full" or a number of bytes."""
    is_bytes = isinstance(recompute, int) and not isinstance(recompute, bool) and recompute >= 0
    if not is_bytes and recompute not in ("none", "full"):
        raise ValueError(f'recompute is {recompute!r}; it must be "none", "full" or a number of bytes')


def check_accumulate(accumulate: object) -> None:
    """Raise ValueError if `accumulate` is not a number of micro-batches."""
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"accumulate is {accumulate!r}; it must be a number of micro-batches, 1 or more")


def check_loss_chunks(loss_chunks: object) -> None:
    """Raise ValueError if `loss_chunks` is not a number of chunks."""
    if not isinstance(loss_chunks, int) or isinstance(loss_chunks, bool) or loss_chunks < 1:
        raise ValueError(f"loss_chunks is {loss_chunks!r}; it must be a number of chunks, 1 for whole logits")


def _tuples(value: Any) -> Any:
    """The value with lists, also nested ones, turned into tuples."""
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
