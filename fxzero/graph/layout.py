"""Which rank owns which element: buckets of whole parameters, each cut into equal contiguous slices.

bucket:   [ w1 ........ | b1 .. | w2 .............. | pad ]      numel = shard_ranks * shard_numel
rank 0:   [ shard_numel ]
rank 1:                  [ shard_numel ]  ...

An all-gather's input is the shard itself and its output is the parameters, as views; a reduce-scatter's input is the
gradient bucket and its output is the gradient shard.

The interleaved layout, a reference to measure against, cuts each parameter instead. The buffer that travels is then
rank-major, and is copied to and from the bucket (`runtime/interleave.py`):

bucket:   [ w1 ...... | b1 .. | w2 ............. ]
travels:  [ w1/0 b1/0 w2/0 | w1/1 b1/1 w2/1 | ... ]      w1/r: the r-th of shard_ranks equal parts of w1

A bucket has one dtype for each role of its elements (`Dtypes`). A `Payload` describes the buffer of a collective.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch

from fxzero.graph.tensor_parallel import TensorParallel

LayoutName: TypeAlias = Literal["contiguous", "interleaved"]

ALIGNMENT_BYTES = 256
"""Alignment of every parameter in a bucket, every shard and every arena block."""


def align(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def shard_shape(shape: Sequence[int], numel: int) -> tuple[int, ...]:
    """Shape in which a rank sees a slice of `numel` elements: `[numel, 1, ...]`, of as many dimensions.

    A scalar's slice has one dimension, since a rank may hold none of it.
    """
    return (numel,) + (1,) * (len(shape) - 1)


@dataclass(frozen=True)
class Dtypes:
    """The dtype of a parameter's elements in each of their roles.

    A collective may travel in a narrower dtype than all of these: its wire format.
    """

    shard: torch.dtype
    """Dtype of a rank's shard, its `.grad` and the optimizer's state: the model's own."""
    compute: torch.dtype
    """Dtype of a gathered bucket, which compute reads."""
    grad: torch.dtype
    """Dtype of a gradient bucket, which backward writes."""
    sum: torch.dtype
    """Dtype in which gradients of several ranks are added, before the sum is cast to the dtype of the shard. Those that
    no_sync() keeps are added in it too."""

    @staticmethod
    @functools.cache
    def all(dtype: torch.dtype) -> Dtypes:
        """One dtype for every role."""
        return Dtypes(dtype, dtype, dtype, dtype)

    @property
    def has_copy(self) -> bool:
        """True if a rank needs a copy of its shard, since compute reads another dtype."""
        return self.compute is not self.shard

    @property
    def casts_gradients(self) -> bool:
        """True if a gradient changes its dtype between its bucket and its shard."""
        return not (self.grad is self.sum is self.shard)

    @property
    def least_itemsize(self) -> int:
        """Bytes of an element in the narrowest role."""
        return min(dtype.itemsize for dtype in vars(self).values())


@dataclass(frozen=True)
class ParamSpec:
    """The canonical name, full shape and own dtype of a parameter, and whether it is trained."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    roles: Dtypes | None = None
    """Dtypes of its roles; None if all are `dtype`."""
    parallel: TensorParallel | None = None
    """Where the parameter lies in a whole one, of which ranks of tensor parallelism have other parts; None if none."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the parameter over all ranks of tensor parallelism."""
        return self.shape if self.parallel is None else self.parallel.shape

    @property
    def is_cut(self) -> bool:
        """True if ranks of tensor parallelism have other parts of the parameter."""
        return self.parallel is not None and self.parallel.is_cut

    def local_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a whole parameter that ranks cut into shards."""
        return whole if self.parallel is None else self.parallel.cut(whole, self.shape)

    @property
    def dtypes(self) -> Dtypes:
        return self.roles or Dtypes.all(self.dtype)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def shard_shape(self, numel: int) -> tuple[int, ...]:
        """Shape in which a rank sees a slice of `numel` elements."""
        return shard_shape(self.shape, numel)

    @property
    def nbytes(self) -> int:
        """Bytes of the full parameter in its own dtype."""
        return self.numel * self.dtype.itemsize

    @property
    def gathered_nbytes(self) -> int:
        """Bytes of the full parameter in the dtype that is gathered."""
        return self.numel * self.dtypes.compute.itemsize

    @property
    def grad_nbytes(self) -> int:
        """Bytes of the full gradient."""
        return self.numel * self.dtypes.grad.itemsize

    @property
    def bucket_key(self) -> tuple[Dtypes, bool]:
        """Key that all parameters of a bucket have in common."""
        return self.dtypes, self.requires_grad


@dataclass(frozen=True)
class Payload:
    """The buffer of one collective: equal slices, one after another, in rank order."""

    fqns: tuple[str, ...]
    """Names of the members of the bucket."""
    num_slices: int
    """Number of ranks that take part, each with a slice."""
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

    def slices(self, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The slice of each rank in a buffer `[numel]`, which may be empty."""
        return buffer.view(self.num_slices, self.slice_numel).unbind()


@dataclass(frozen=True)
class Slice:
    """The elements `[start, stop)` of one parameter, which one rank owns at `offset` in its shard."""

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
    """Number of ranks that share the bucket."""

    def __hash__(self) -> int:
        """Of the first member, which no other bucket of a model has."""
        return hash((self.params[0].fqn, len(self.params), self.shard_ranks))

    @property
    def interleaved(self) -> bool:
        """True if the buffer that travels has another layout than the bucket, so that both need memory."""
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

    @cached_property
    def by_fqn(self) -> dict[str, ParamSpec]:
        """The members by name."""
        return {param.fqn: param for param in self.params}

    @property
    def _alignment(self) -> int:
        """Elements to whose multiples parameters are aligned: `ALIGNMENT_BYTES` in the narrowest role."""
        return max(1, ALIGNMENT_BYTES // self.dtypes.least_itemsize)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Index of the first element of each parameter in the bucket, by name."""
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
    def copy_nbytes(self) -> int:
        """Bytes of the copy of a rank's shard in the dtype that compute reads; 0 where the shard itself is read."""
        return self.shard_numel * self.dtypes.compute.itemsize if self.dtypes.has_copy else 0

    @property
    def shard_nbytes(self) -> int:
        """Bytes of a rank's shard, and of its gradient."""
        return self.shard_numel * self.dtypes.shard.itemsize

    @cached_property
    def gathered(self) -> Payload:
        """Payload of an all-gather: parameters in the dtype that compute reads."""
        return Payload(self.fqns, self.shard_ranks, self.shard_numel, self.dtypes.compute)

    @cached_property
    def gradients(self) -> Payload:
        """Payload of a reduce-scatter: gradients in the dtype that backward writes."""
        return Payload(self.fqns, self.shard_ranks, self.shard_numel, self.dtypes.grad)

    @cached_property
    def sums(self) -> Payload:
        """Gradients in the dtype in which they are added: those that no_sync() keeps, and those at a wait."""
        return Payload(self.fqns, self.shard_ranks, self.shard_numel, self.dtypes.sum)

    def slice_of(self, param: ParamSpec, rank: int) -> Slice:
        """The part of `param` in the shard of `rank`; empty if the shard holds nothing of it."""
        first = self.offsets[param.fqn]
        begin = rank * self.shard_numel
        start = min(max(begin - first, 0), param.numel)
        stop = min(max(begin + self.shard_numel - first, start), param.numel)
        offset = first + start - begin if stop > start else 0
        return Slice(start, stop, offset)


class InterleavedBucket(Bucket):
    """A bucket whose parameters are each cut into `shard_ranks` equal parts; a rank's shard has one part of each.

    The bucket itself holds whole parameters one after another. Each begins at `shard_ranks` times the offset of its
    part in a shard, so that `numel` is `shard_ranks * shard_numel` in this layout too.
    """

    @property
    def interleaved(self) -> bool:
        return True

    def part_numel(self, param: ParamSpec) -> int:
        """Elements of one of the equal parts of a parameter, padding included; the last parts may be padding alone.

        It is a multiple of the alignment, so that a fused optimizer kernel vectorises a part as it does the parameter:
        such kernels round elements outside of full vectors in another way.
        """
        return align(-(-param.numel // self.shard_ranks), self._alignment)

    @cached_property
    def part_offsets(self) -> dict[str, int]:
        """Index of the first element of each parameter's part in a shard, by name."""
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
    """Raise ValueError if `name` is not a LayoutName; the message lists the names."""
    if name not in get_args(LayoutName):
        raise ValueError(f"layout is {name!r}; it must be one of {', '.join(map(repr, get_args(LayoutName)))}")


def make_bucket(params: Iterable[ParamSpec], shard_ranks: int, layout: LayoutName = "contiguous") -> Bucket:
    """A bucket in a layout. With one rank the layouts are equal, because its shard is the whole bucket."""
    is_interleaved = layout == "interleaved" and shard_ranks > 1
    return (InterleavedBucket if is_interleaved else Bucket)(tuple(params), shard_ranks)


@dataclass(frozen=True)
class Layout:
    """The buckets of a model, fixed once: every plan gathers and reduces exactly these."""

    buckets: tuple[Bucket, ...]
    shard_ranks: int

    @cached_property
    def bucket_of(self) -> dict[str, Bucket]:
        """Maps the name of each parameter to its bucket."""
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

    One bucket is open for each `bucket_key`, so that a frozen parameter between trained ones closes no bucket.

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
