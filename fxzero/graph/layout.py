"""Which rank owns which element: buckets of whole parameters, each cut into equal contiguous slices.

bucket:   [ w1 ........ | b1 .. | w2 .............. | pad ]      numel = shard_ranks * shard_numel
rank 0:   [ shard_numel ]
rank 1:                  [ shard_numel ]  ...

An all-gather's input is the shard itself and its output is the parameters, as views; a reduce-scatter's input is the
gradient bucket and its output is the gradient shard.

The interleaved layout, selectable as the reference, cuts each parameter instead. What travels is then rank-major, and
is copied to and from the bucket (`runtime/interleave.py`):

bucket:   [ w1 ...... | b1 .. | w2 ............. ]
travels:  [ w1/0 b1/0 w2/0 | w1/1 b1/1 w2/1 | ... ]      w1/r: the r-th of shard_ranks equal parts of w1

A bucket has one dtype for each role that its elements play (`Dtypes`). What a collective moves of it is a `Payload`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch

LayoutName: TypeAlias = Literal["contiguous", "interleaved"]

ALIGNMENT_BYTES = 256
"""Every parameter in a bucket, every shard and every arena block starts at a multiple of this."""


def align(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Dtypes:
    """The dtype that the elements of a parameter have in each of their roles.

    What travels may be narrower still: that is the wire format of a collective.
    """

    shard: torch.dtype
    """In a rank's shard: of the parameter, its `.grad` and the optimizer's state. The model's own."""
    compute: torch.dtype
    """In a gathered bucket, which compute reads."""
    grad: torch.dtype
    """In a gradient bucket, which backward writes."""
    sum: torch.dtype
    """In which the gradients of several ranks are added; the sum is then cast to that of the shard."""

    @classmethod
    def all(cls, dtype: torch.dtype) -> Dtypes:
        """One dtype for every role."""
        return cls(dtype, dtype, dtype, dtype)

    @property
    def least_itemsize(self) -> int:
        """Bytes of an element in the narrowest role."""
        return min(self.shard.itemsize, self.compute.itemsize, self.grad.itemsize, self.sum.itemsize)


@dataclass(frozen=True)
class ParamSpec:
    """What a plan must know of a parameter: its canonical name, full shape, own dtype, and whether it is trained."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    roles: Dtypes | None = None
    """The dtypes of its roles, where they are not all its own."""

    @property
    def dtypes(self) -> Dtypes:
        return self.roles or Dtypes.all(self.dtype)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter in its own dtype."""
        return self.numel * self.dtype.itemsize

    @property
    def gathered_nbytes(self) -> int:
        """Bytes of the whole parameter where it is gathered."""
        return self.numel * self.dtypes.compute.itemsize

    @property
    def grad_nbytes(self) -> int:
        """Bytes of its whole gradient."""
        return self.numel * self.dtypes.grad.itemsize

    @property
    def bucket_key(self) -> tuple[Dtypes, bool]:
        """Parameters share a bucket only if their keys are equal."""
        return self.dtypes, self.requires_grad


@dataclass(frozen=True)
class Payload:
    """What one collective carries: equal slices, one after another, in rank order."""

    fqns: tuple[str, ...]
    """The members of the bucket that it belongs to."""
    num_slices: int
    """One for each rank that takes part."""
    slice_numel: int
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return self.num_slices * self.slice_numel

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def slice_nbytes(self) -> int:
        return self.slice_numel * self.dtype.itemsize


@dataclass(frozen=True)
class Slice:
    """The part of one parameter that one rank owns: elements `[start, stop)`, at `offset` in the rank's shard."""

    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Bucket:
    """Parameters that are gathered and reduced by one collective."""

    params: tuple[ParamSpec, ...]
    shard_ranks: int
    """The ranks that it is cut for."""

    @property
    def interleaved(self) -> bool:
        """True if what travels is laid out in another way than the bucket, so that both need memory."""
        return False

    @property
    def dtypes(self) -> Dtypes:
        return self.params[0].dtypes

    @property
    def requires_grad(self) -> bool:
        return self.params[0].requires_grad

    @cached_property
    def fqns(self) -> tuple[str, ...]:
        return tuple(param.fqn for param in self.params)

    @property
    def _alignment(self) -> int:
        """Elements between two places at which a parameter may begin: `ALIGNMENT_BYTES` in the narrowest role."""
        return max(1, ALIGNMENT_BYTES // self.dtypes.least_itemsize)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The first element of each parameter in the bucket, by name."""
        offsets: dict[str, int] = {}
        end = 0
        for param in self.params:
            offsets[param.fqn] = end
            end = align(end + param.numel, self._alignment)
        return offsets

    @cached_property
    def shard_numel(self) -> int:
        last = self.params[-1]
        used = self.offsets[last.fqn] + last.numel
        return align(-(-used // self.shard_ranks), self._alignment)

    @property
    def numel(self) -> int:
        """Elements of the whole bucket, padding included: `shard_ranks * shard_numel`."""
        return self.shard_ranks * self.shard_numel

    @property
    def shard_nbytes(self) -> int:
        """Bytes of a rank's shard; those of its gradient are as many."""
        return self.shard_numel * self.dtypes.shard.itemsize

    @cached_property
    def gathered(self) -> Payload:
        """The gathered parameters, in the dtype that compute reads."""
        return Payload(self.fqns, self.shard_ranks, self.shard_numel, self.dtypes.compute)

    @cached_property
    def gradients(self) -> Payload:
        """The gradients before they are reduced, in the dtype that backward writes."""
        return Payload(self.fqns, self.shard_ranks, self.shard_numel, self.dtypes.grad)

    def slice_of(self, param: ParamSpec, rank: int) -> Slice:
        """The part of `param` that lies in the shard of `rank`; empty where they do not meet."""
        first = self.offsets[param.fqn]
        begin = rank * self.shard_numel
        start = min(max(begin - first, 0), param.numel)
        stop = min(max(begin + self.shard_numel - first, start), param.numel)
        offset = first + start - begin if stop > start else 0
        return Slice(start, stop, offset)


class InterleavedBucket(Bucket):
    """Parameters each of which is cut into `shard_ranks` equal parts; a rank's shard is its part of every one.

    The bucket itself holds whole parameters one after another, as any does. In it each begins at `shard_ranks` times
    the place of its part in the shard, so that bucket and shards have the sizes that they have in any layout.
    """

    @property
    def interleaved(self) -> bool:
        return True

    def part_numel(self, param: ParamSpec) -> int:
        """Elements of one of the equal parts of a parameter, padding included; the last ones may hold nothing else.

        A part begins where vectors do that start at the parameter's first element: fused kernels round the rest, which
        fills no vector, in another way.
        """
        return align(-(-param.numel // self.shard_ranks), self._alignment)

    @cached_property
    def part_offsets(self) -> dict[str, int]:
        """The first element of the part of each parameter in every shard, by name."""
        sizes = [self.part_numel(param) for param in self.params]
        return dict(zip(self.fqns, itertools.accumulate(sizes, initial=0), strict=False))

    @cached_property
    def offsets(self) -> dict[str, int]:
        return {fqn: self.shard_ranks * offset for fqn, offset in self.part_offsets.items()}

    @cached_property
    def shard_numel(self) -> int:
        return sum(self.part_numel(param) for param in self.params)

    def slice_of(self, param: ParamSpec, rank: int) -> Slice:
        start = min(rank * self.part_numel(param), param.numel)
        stop = min(start + self.part_numel(param), param.numel)
        return Slice(start, stop, self.part_offsets[param.fqn] if stop > start else 0)


def check_layout(name: str) -> None:
    """Refuse what is no name of a layout.

    Raises:
        ValueError: names those there are.
    """
    if name not in get_args(LayoutName):
        raise ValueError(f"layout is {name!r}; it must be one of {', '.join(map(repr, get_args(LayoutName)))}")


def make_bucket(params: Iterable[ParamSpec], shard_ranks: int, layout: LayoutName = "contiguous") -> Bucket:
    """A bucket of a layout. A rank that is alone has nothing to interleave: its shard is the whole bucket."""
    is_interleaved = layout == "interleaved" and shard_ranks > 1
    return (InterleavedBucket if is_interleaved else Bucket)(tuple(params), shard_ranks)


@dataclass(frozen=True)
class Layout:
    """The buckets of a model. Fixed once; every plan gathers and reduces exactly these."""

    buckets: tuple[Bucket, ...]
    shard_ranks: int

    @cached_property
    def bucket_of(self) -> dict[str, Bucket]:
        """The bucket of each parameter, by name."""
        return {fqn: bucket for bucket in self.buckets for fqn in bucket.fqns}

    @property
    def params(self) -> Iterator[ParamSpec]:
        return (param for bucket in self.buckets for param in bucket.params)

    @property
    def shard_nbytes(self) -> int:
        """Bytes of all parameter shards of one rank."""
        return sum(bucket.shard_nbytes for bucket in self.buckets)


def group_into_buckets(
    params: Iterable[ParamSpec],
    shard_ranks: int,
    bucket_bytes: int,
    layout: LayoutName = "contiguous",
    *,
    head_bytes: int | None = None,
) -> tuple[Bucket, ...]:
    """Cut a sequence of parameters into buckets of neighbours, each of at most `bucket_bytes` or one parameter.

    One bucket is open for each set of dtypes and trainedness, so that a frozen parameter between trained ones cuts
    nothing.

    Args:
        bucket_bytes: upper bound on the bytes of a gathered bucket, without padding.
        head_bytes: upper bound for the first bucket; each later one may be twice as large, up to `bucket_bytes`.
    """
    done: list[list[ParamSpec]] = []
    open_: dict[tuple[Dtypes, bool], tuple[list[ParamSpec], int]] = {}
    for param in params:
        members, nbytes = open_.get(param.bucket_key, (None, 0))
        limit = bucket_bytes if head_bytes is None else min(bucket_bytes, head_bytes << min(max(len(done) - 1, 0), 40))
        if members is None or nbytes + param.gathered_nbytes > limit:
            members, nbytes = list[ParamSpec](), 0
            done.append(members)
        members.append(param)
        open_[param.bucket_key] = members, nbytes + param.gathered_nbytes
    return tuple(make_bucket(members, shard_ranks, layout) for members in done)
