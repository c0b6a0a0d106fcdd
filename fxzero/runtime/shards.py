"""The persistent storage of one rank: all parameter shards in one buffer, all gradient shards in another.

The user's Parameter objects live on: `p.data` is this rank's slice of the parameter, a view of the first buffer, and
`p.grad` is a view of the second. Both are `[numel, 1, ...]`, with as many dimensions as the parameter.

Where compute reads another dtype than the parameter's, a third buffer has copies of the shards in that dtype. They are
what gathers send; `InFlight` says when they are refreshed.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Generic, TypeVar

import torch
from torch import nn

from fxzero.comm.base import Comm
from fxzero.errors import InputMismatchError
from fxzero.graph.layout import Bucket, Dtypes, Layout, ParamSpec, Payload
from fxzero.runtime.storage import storage_view

Key = TypeVar("Key", bound=Hashable)


def spec_of(fqn: str, param: nn.Parameter, roles: Dtypes | None = None) -> ParamSpec:
    """Describe a parameter at full size.

    Args:
        roles: dtypes of its roles; None if all are its own.

    Raises:
        InputMismatchError: it is not contiguous, of a complex dtype, no plain tensor, or not initialised yet.
    """
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise InputMismatchError(f"{fqn} is an uninitialised lazy parameter. Run the model once before compile.")
    if type(param.data) is not torch.Tensor:
        raise InputMismatchError(
            f"{fqn} is a {type(param.data).__name__}. Only plain tensors can be sharded: compile the model before "
            "other libraries shard or quantize it."
        )
    if param.dtype.is_complex:
        raise InputMismatchError(
            f"{fqn} is a parameter of dtype {param.dtype}. Only floating parameters, and frozen ones of integers, can "
            "be sharded; register it as a buffer instead."
        )
    if not param.is_contiguous():
        raise InputMismatchError(
            f"{fqn} of shape {tuple(param.shape)} is not contiguous (strides {param.stride()}). Make it contiguous "
            f"before compile: p.data = p.data.contiguous()."
        )
    return ParamSpec(fqn, tuple(param.shape), param.dtype, param.requires_grad, roles)


def check_storage(params: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that share memory without being one: after sharding they would no longer.

    Raises:
        InputMismatchError: names two.
    """
    real = [(param.untyped_storage().data_ptr(), fqn, param) for fqn, param in params.items() if not param.is_meta]
    begins = [(storage, param.data_ptr(), param.data_ptr() + param.nbytes, fqn) for storage, fqn, param in real]
    in_order = sorted(begin for begin in begins if begin[1] < begin[2])
    for (storage, _, end, fqn), (other_storage, begin, _, other) in itertools.pairwise(in_order):
        if storage == other_storage and begin < end:
            raise InputMismatchError(
                f"{fqn} and {other} share memory, but are two parameters. To tie them, register the same Parameter "
                "object in both places; else copy one."
            )


class FlatBuffer(Generic[Key]):
    """One contiguous block that holds the parts of several keys, those of one dtype side by side.

    Args:
        sizes: the elements and the dtype of each part.
    """

    def __init__(self, sizes: Mapping[Key, tuple[int, torch.dtype]], device: torch.device) -> None:
        self.parts: dict[Key, torch.Tensor] = {}
        """The part of each key, flat."""
        self.segments: list[torch.Tensor] = []
        """The whole block, one flat tensor per dtype, padding included."""
        self.nbytes = sum(numel * dtype.itemsize for numel, dtype in sizes.values())
        storage = torch.zeros(self.nbytes, dtype=torch.uint8, device=device).untyped_storage()
        offset = 0
        for dtype in sorted({dtype for _, dtype in sizes.values()}, key=str):
            begin = offset
            for key, (numel, _) in ((key, size) for key, size in sizes.items() if size[1] is dtype):
                self.parts[key] = storage_view(storage, offset, numel, dtype, device)
                offset += numel * dtype.itemsize
            self.segments.append(storage_view(storage, begin, (offset - begin) // dtype.itemsize, dtype, device))

    def extend(self, other: FlatBuffer[Key]) -> None:
        """Take over the parts of another buffer, in a block of their own."""
        self.parts.update(other.parts)
        self.segments += other.segments
        self.nbytes += other.nbytes


class Shards:
    """This rank's slice of every parameter, and of every gradient."""

    def __init__(self, layout: Layout, rank: int, device: torch.device) -> None:
        self.layout = layout
        self.rank = rank
        self.device = device
        self.params = FlatBuffer(_shard_sizes(layout.buckets), device)
        self.grads = FlatBuffer(_shard_sizes(b for b in layout.buckets if b.requires_grad), device)
        self.copies = FlatBuffer(_copy_sizes(layout.buckets), device)
        self.secondaries: FlatBuffer[Payload] = FlatBuffer({}, device)
        """The slices of buckets that this rank gathered from other nodes, as they travel inside its own."""

    def keep_secondaries(self, payloads: Iterable[Payload]) -> None:
        """Make memory for secondary shards, as `StepGraph.secondaries` has them, where there is none."""
        sizes = {each: (each.slice_numel, each.dtype) for each in payloads if each not in self.secondaries.parts}
        if sizes:
            self.secondaries.extend(FlatBuffer(sizes, self.device))

    def sent(self, bucket: Bucket) -> torch.Tensor:
        """What gathers send of a bucket: its shard, or the copy of it in the dtype that compute reads."""
        return self.copies.parts.get(bucket, self.params.parts[bucket])

    def refresh_copies(self) -> None:
        """Bring the copies of the shards in line with these."""
        with torch.no_grad():
            for bucket, copy in self.copies.parts.items():
                copy.copy_(self.params.parts[bucket])

    def grad_shard(self, bucket: Bucket) -> torch.Tensor:
        """The gradient shard of a bucket; that of one frozen when the layout was fixed is made on demand."""
        if bucket not in self.grads.parts:
            self.grads.extend(FlatBuffer(_shard_sizes([bucket]), self.device))
        return self.grads.parts[bucket]

    def param_view(self, fqn: str) -> torch.Tensor:
        """This rank's slice of a parameter, `[numel, 1, ...]`; empty where the rank owns none of it."""
        return self._slice(self.params.parts[self.layout.bucket_of[fqn]], fqn)

    def grad_view(self, fqn: str) -> torch.Tensor:
        """This rank's slice of a gradient, of the shape of the parameter's."""
        return self._slice(self.grad_shard(self.layout.bucket_of[fqn]), fqn)

    def cut(self, fqn: str, full: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a tensor shaped as the full parameter: a view of it, shaped as the shard."""
        bucket = self.layout.bucket_of[fqn]
        spec = bucket.by_fqn[fqn]
        part = bucket.slice_of(spec, self.rank)
        return full.reshape(-1)[part.start : part.stop].view(spec.shard_shape(part.numel))

    def store(self, fqn: str, full: torch.Tensor) -> None:
        """Copy this rank's slice of a full parameter into its shard."""
        self.param_view(fqn).copy_(self.cut(fqn, full.detach()))

    def _slice(self, shard: torch.Tensor, fqn: str) -> torch.Tensor:
        bucket = self.layout.bucket_of[fqn]
        spec = bucket.by_fqn[fqn]
        part = bucket.slice_of(spec, self.rank)
        # An empty view begins at 1, so that its offset tells it from a new empty tensor, which begins at 0.
        begin = part.offset if part.numel else 1
        return shard[begin : begin + part.numel].view(spec.shard_shape(part.numel))


def _shard_sizes(buckets: Iterable[Bucket]) -> dict[Bucket, tuple[int, torch.dtype]]:
    return {bucket: (bucket.shard_numel, bucket.dtypes.shard) for bucket in buckets}


def _copy_sizes(buckets: Iterable[Bucket]) -> dict[Bucket, tuple[int, torch.dtype]]:
    return {bucket: (bucket.shard_numel, bucket.dtypes.compute) for bucket in buckets if bucket.dtypes.has_copy}


def unflatten(bucket: Bucket, full: torch.Tensor) -> dict[str, torch.Tensor]:
    """The members of a bucket at their full shapes: views of `full`, `[bucket.numel]`, which holds whole parameters.

    In an interleaved layout that is not what travels; see `gathered_members`.
    """
    return {fqn: member_of(bucket, full, fqn) for fqn in bucket.fqns}


def member_of(bucket: Bucket, full: torch.Tensor, fqn: str) -> torch.Tensor:
    """One member of a bucket at its full shape, as of `unflatten`."""
    param = bucket.by_fqn[fqn]
    return full[bucket.offsets[fqn] :][: param.numel].view(param.shape)


def shard_full_params(
    shards: Shards,
    params: Mapping[str, nn.Parameter],
    comm: Comm,
    *,
    sync_init: bool,
    from_rank0: AbstractSet[str] = frozenset(),
) -> None:
    """Cut real parameters of full size into shards, bucket by bucket, freeing the full storages as it goes.

    Parameters on meta are left alone, but for those that rank 0 has values of.

    Args:
        sync_init: send rank 0's values to all; else each rank cuts its own.
        from_rank0: names of parameters on meta that rank 0 has values of.
    """
    for bucket in shards.layout.buckets:
        real = [param for param in bucket.params if not params[param.fqn].is_meta or param.fqn in from_rank0]
        if real and sync_init and not comm.is_alone:
            received = torch.empty_like(shards.params.parts[bucket])
            values = {param.fqn: params[param.fqn] for param in bucket.params if not params[param.fqn].is_meta}
            comm.scatter_from_rank0(received, flatten(bucket, values, shards.device) if comm.is_rank0 else None)
            for param in real:
                part = bucket.slice_of(param, comm.rank)
                shards.param_view(param.fqn).view(-1).copy_(received[part.offset : part.offset + part.numel])
        else:
            for param in real:
                shards.store(param.fqn, params[param.fqn])
        for param in real:
            install(param.fqn, params[param.fqn], shards.param_view(param.fqn))


def flatten(bucket: Bucket, full_params: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """The shards of all ranks, one after another, from full parameters; zeros where one is not given."""
    full = torch.zeros(bucket.numel, dtype=bucket.dtypes.shard, device=device)
    shards = full.split(bucket.shard_numel) if bucket.numel else []
    for param in (param for param in bucket.params if param.fqn in full_params):
        values = full_params[param.fqn].detach().reshape(-1)
        for rank, shard in enumerate(shards):
            part = bucket.slice_of(param, rank)
            shard[part.offset : part.offset + part.numel].copy_(values[part.start : part.stop])
    return full


def install(fqn: str, param: nn.Parameter, view: torch.Tensor) -> None:
    """Make a view of the parameter buffer the data of the user's Parameter object, which stays the same object.

    Raises:
        InputMismatchError: something holds a weak reference to a parameter on the meta device.
    """
    if param.is_meta:
        if weakref.getweakrefs(param):
            raise InputMismatchError(
                f"Something holds a weak reference to {fqn}, which is on the meta device, so that it cannot become a "
                "real tensor. Drop the reference, or build the model on a real device."
            )
        real = type(param)(view, requires_grad=param.requires_grad)
        vars(real).update(vars(param))
        torch.utils.swap_tensors(param, real)
    else:
        param.data = view
    param.grad = None
