"""Which rank owns which element: buckets of whole parameters, each cut into equal contiguous slices.

bucket:   [ w1 ........ | b1 .. | w2 .............. | pad ]      numel = world_size * shard_numel
rank 0:   [ shard_numel ]
rank 1:                  [ shard_numel ]  ...

An all-gather's input is the shard itself and its output is the parameters, as views; a reduce-scatter's input is the
gradient bucket and its output is the gradient shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

ALIGNMENT_BYTES = 256
"""Every parameter in a bucket, every shard and every arena block starts at a multiple of this."""


def align(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ParamSpec:
    """What a plan must know of a parameter: its canonical name, full shape, dtype, and whether it is trained."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def bucket_key(self) -> tuple[torch.dtype, bool]:
        """Parameters share a bucket only if their keys are equal."""
        return self.dtype, self.requires_grad


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
    world_size: int

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def requires_grad(self) -> bool:
        return self.params[0].requires_grad

    @cached_property
    def fqns(self) -> tuple[str, ...]:
        return tuple(param.fqn for param in self.params)

    @property
    def _alignment(self) -> int:
        return max(1, ALIGNMENT_BYTES // self.dtype.itemsize)

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
        return align(-(-used // self.world_size), self._alignment)

    @property
    def numel(self) -> int:
        """Elements of the whole bucket, padding included: `world_size * shard_numel`."""
        return self.world_size * self.shard_numel

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def shard_nbytes(self) -> int:
        return self.shard_numel * self.dtype.itemsize

    def slice_of(self, param: ParamSpec, rank: int) -> Slice:
        """The part of `param` that lies in the shard of `rank`; empty where they do not meet."""
        first = self.offsets[param.fqn]
        begin = rank * self.shard_numel
        start = min(max(begin - first, 0), param.numel)
        stop = min(max(begin + self.shard_numel - first, start), param.numel)
        offset = first + start - begin if stop > start else 0
        return Slice(start, stop, offset)


@dataclass(frozen=True)
class Layout:
    """The buckets of a model. Fixed once; every plan gathers and reduces exactly these."""

    buckets: tuple[Bucket, ...]
    world_size: int

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


def group_into_buckets(params: Iterable[ParamSpec], world_size: int, bucket_bytes: int) -> tuple[Bucket, ...]:
    """Cut a sequence of parameters into buckets of neighbours, each of at most `bucket_bytes` or one parameter.

    One bucket is open per dtype and trainedness, so that a frozen parameter between trained ones cuts nothing.
    """
    done: list[list[ParamSpec]] = []
    open_: dict[tuple[torch.dtype, bool], list[ParamSpec]] = {}
    for param in params:
        members = open_.get(param.bucket_key)
        if members is None or sum(p.nbytes for p in members) + param.nbytes > bucket_bytes:
            members = open_[param.bucket_key] = []
            done.append(members)
        members.append(param)
    return tuple(Bucket(tuple(members), world_size) for members in done)
