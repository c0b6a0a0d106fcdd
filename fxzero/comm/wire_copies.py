"""Conversions between a bucket, what travels of it and its shard, in several types, bound once to their buffers.

    gather    shard -> pack -> own row of staging -> collective -> staging -> unpack -> bucket
    reduce    gradient bucket -> cast -> staging -> collective -> terms of all ranks -> sum -> gradient shard

A gradient bucket whose own type travels, but is not that in which it is summed or that of the shard, needs no staging.

The rank's own row is unpacked like those of others, so that all ranks compute with the same parameters. No operator
here mixes dtypes but copies: on the CPU, others would convert in a temporary of the bucket's size.

Source: ZeRO++ (arXiv:2306.10209), qwZ, quantised per block; deviation: quantised from the fp32 shard, not from an fp16
copy. A wire format is no precision policy: parameters are cast back to the type in which compute reads them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fxzero.comm.backend import Backend
from fxzero.comm.base import Bound, Comm
from fxzero.graph.layout import Bucket, Payload
from fxzero.graph.sharding import Sharding
from fxzero.graph.wire import MAX_VALUE, SCALE_DTYPE, WireFormat, on_wire, split_rows

SUMMED_NUMEL = 2**17
"""Elements that are converted and summed at a time where sums have another dtype than what travels."""

_LEAST_SCALE = torch.finfo(SCALE_DTYPE).tiny
"""Of a block of zeros, which would divide by zero."""


def pack(format: WireFormat, shard: Tensor, row: Tensor, work: Tensor | None = None) -> Callable[[], object]:
    """What writes a shard for the wire.

    Quantised, an element differs by at most half the scale of its block, which is the largest magnitude in it over 127;
    a block with an element that is not finite becomes NaN as a whole.

    Args:
        shard: `[shard_numel]`, of the bucket's dtype.
        row: `[row_numel]`, of the format's dtype.
        work: `[shard_numel]`, float32; a cast needs none.
    """
    if format.block_numel is None:
        return partial(row.copy_, shard)
    assert work is not None
    values, scales = split_rows(row, len(shard), format)
    blocks = _blocks(work, scales, format.block_numel)
    room = work

    def quantize() -> None:
        room.copy_(shard).abs_()
        for elements, scale in blocks:
            torch.amax(elements, dim=-1, keepdim=True, out=scale)
        scales.div_(MAX_VALUE).clamp_(min=_LEAST_SCALE)
        room.copy_(shard)
        for elements, scale in blocks:
            elements.div_(scale)
        values.copy_(room.round_())

    return quantize


def unpack(
    format: WireFormat, bucket: Bucket, staging: Tensor, full: Tensor, work: Tensor | None = None
) -> Callable[[], object]:
    """What brings the rows of all ranks to the bucket; not for a quantised interleaved one.

    Args:
        staging: `[shard_ranks * row_numel]`, of the format's dtype.
        full: `[bucket.numel]`.
        work: `[shard_numel]`, float32; needed to dequantise to another dtype only.
    """
    if format.block_numel is None:
        return partial(full.copy_, staging)
    into = full.view(bucket.shard_ranks, bucket.shard_numel)
    values, scales = split_rows(staging.view(bucket.shard_ranks, -1), bucket.shard_numel, format)
    if full.dtype is SCALE_DTYPE:
        return partial(_dequantize, values, into, _blocks(into, scales, format.block_numel))
    assert work is not None
    rows = [
        (values[rank], into[rank], work, _blocks(work, scales[rank], format.block_numel))
        for rank in range(bucket.shard_ranks)
    ]

    def dequantize_rows() -> None:
        for value, row, room, blocks in rows:
            _dequantize(value, room, blocks)
            row.copy_(room)

    return dequantize_rows


def _dequantize(values: Tensor, into: Tensor, blocks: list[tuple[Tensor, Tensor]]) -> None:
    into.copy_(values)
    for elements, scale in blocks:
        elements.mul_(scale)


def _blocks(values: Tensor, scales: Tensor, block_numel: int) -> list[tuple[Tensor, Tensor]]:
    """Elements by block and their scales, `[..., n, block_numel]` and `[..., n, 1]`; then those of a last short block.

    Args:
        values: `[..., shard_numel]`.
        scales: `[..., num_scales]`.
    """
    num_whole = values.shape[-1] // block_numel
    end = num_whole * block_numel
    whole = values[..., :end].unflatten(-1, (num_whole, block_numel)), scales[..., :num_whole].unsqueeze(-1)
    short = values[..., end:].unsqueeze(-2), scales[..., num_whole:].unsqueeze(-1)
    return [pair for pair in (whole, short) if pair[0].numel()]


def casts(bucket: Bucket, format: WireFormat | None) -> bool:
    """True if the gradients of a bucket change their dtype on their way to the shard."""
    return format is not None or bucket.dtypes.casts_gradients


def reduce_scratch_nbytes(
    backend: Backend, sharding: Sharding, bucket: Bucket, format: WireFormat | None, *, accumulate: bool
) -> int:
    """Bytes that `bind_narrow_reduce` needs between its start and its wait."""
    travels = on_wire(bucket.gradients, format)
    if _sums_here(backend, sharding, bucket, format):
        rooms = _num_rooms(bucket, accumulate=accumulate) * _room_numel(bucket) * bucket.dtypes.sum.itemsize
        return (bucket.shard_ranks - 1) * travels.slice_nbytes + rooms
    inner = backend.reduce_scratch_numel(travels, sharding, accumulate=False)
    room = accumulate * bucket.shard_nbytes
    return travels.slice_nbytes + room + inner * travels.dtype.itemsize


def bucket_scratch_nbytes(
    backend: Backend, sharding: Sharding, bucket: Bucket, format: WireFormat | None, *, accumulate: bool
) -> int:
    """Bytes that the reduction of a bucket needs between its start and its wait."""
    if casts(bucket, format):
        return reduce_scratch_nbytes(backend, sharding, bucket, format, accumulate=accumulate)
    payload = bucket.gradients
    return backend.reduce_scratch_numel(payload, sharding, accumulate=accumulate) * payload.dtype.itemsize


def bind_bucket_reduce(
    comm: Comm,
    bucket: Bucket,
    format: WireFormat | None,
    sent: Tensor,
    scratch: Tensor | None,
    shard: Tensor,
    *,
    accumulate: bool,
) -> Bound:
    """Average what all ranks send of a bucket's gradients; this rank's slice goes to `shard`.

    Args:
        scratch: `bucket_scratch_nbytes` bytes, flat; None if that is 0.
        format, sent, accumulate: as of `bind_narrow_reduce`.
    """
    if casts(bucket, format):
        assert scratch is not None
        return bind_narrow_reduce(comm, bucket, format, sent, scratch, shard, accumulate=accumulate)
    room = None if scratch is None else scratch.view(bucket.dtypes.grad)
    return comm.bind_reduce(bucket.gradients, sent, room, shard, accumulate=accumulate)


def _sums_here(backend: Backend, sharding: Sharding, bucket: Bucket, format: WireFormat | None) -> bool:
    """True if sums are made in another dtype than travels, which no backend does."""
    return backend.sums_locally(sharding) and (format is not None or bucket.dtypes.grad is not bucket.dtypes.sum)


def sums_here(comm: Comm, bucket: Bucket) -> bool:
    """True if the gradients of a bucket travel in their own dtype and are summed in another one."""
    return _sums_here(comm.backend, comm.sharding, bucket, None)


def _room_numel(bucket: Bucket) -> int:
    return min(bucket.shard_numel, SUMMED_NUMEL)


def _num_rooms(bucket: Bucket, *, accumulate: bool) -> int:
    """Rooms of the sum's dtype that it takes to sum: one to convert in, and one where the sum is not the shard."""
    return 1 + (accumulate or bucket.dtypes.sum is not bucket.dtypes.shard)


def bind_narrow_reduce(
    comm: Comm,
    bucket: Bucket,
    format: WireFormat | None,
    sent: Tensor,
    scratch: Tensor,
    shard: Tensor,
    *,
    accumulate: bool,
) -> Bound:
    """Average what all ranks send; this rank's slice goes to `shard` [bucket.shard_numel].

    Where sums are local (gloo) they are made in the dtype that the bucket has for sums, in rank order:
    ((g0 + g1) + g2) / divisor, of terms that are all rounded to the wire's dtype, the own one too, so that who owns
    an element does not matter. Elsewhere (NCCL) the backend sums in the dtype that travels, as FSDP2 does: an exchange
    would cross the link between two machines once for each rank of a machine, where NCCL's rings cross it once.

    Args:
        format: None if the dtype of the gradient bucket travels.
        sent: `[shard_ranks * row_numel]`, of the dtype that travels: the unsharded gradients.
        scratch: `reduce_scratch_nbytes` bytes, flat.
        accumulate: add the average to `shard`; else overwrite it.
    """
    travels = on_wire(bucket.gradients, format)
    sums_locally = _sums_here(comm.backend, comm.sharding, bucket, format)
    num_terms = bucket.shard_ranks - 1 if sums_locally else 1
    end = num_terms * travels.slice_nbytes
    received = scratch[:end].view(travels.dtype).split(travels.slice_numel)
    if not sums_locally:
        begin = end + accumulate * shard.nbytes
        room, inner = scratch[end:begin].view(shard.dtype), scratch[begin:].view(travels.dtype)
        bound = comm.bind_reduce(travels, sent, inner if len(inner) else None, received[0], accumulate=False)
        return bound.then(partial(_bring, received[0], shard, room if accumulate else None))
    own = sent.split(travels.slice_numel)[comm.rank]
    terms = [*received[: comm.rank], own, *received[comm.rank :]]
    rooms = scratch[end:].view(bucket.dtypes.sum).split(_room_numel(bucket))
    is_elsewhere = _num_rooms(bucket, accumulate=accumulate) > 1
    parts: list[tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]] = []
    for into, *of_terms in zip(*(each.split(SUMMED_NUMEL) for each in (shard, *terms)), strict=True):
        room, *others = (each[: len(into)] for each in rooms)
        parts.append((tuple(of_terms), room, others[0] if is_elsewhere else into, into))
    return comm.bind_exchange(travels, sent, terms).then(partial(_average, parts, comm.divisor, accumulate))


def bind_reduce_of_sums(
    comm: Comm, bucket: Bucket, sums: Tensor, rooms: Sequence[Tensor], shard: Tensor, *, accumulate: bool
) -> Bound:
    """Average over ranks what each of them has summed over micro-steps in the dtype of sums, where sums are local.

    Args:
        sums: `[bucket.numel]`, of the dtype of sums; undefined after the wait.
        rooms: memory of `shard_ranks - 1` slices of sums, in pieces: the gradient bucket and its scratch.
    """
    payload = bucket.sums
    slices = payload.slices(sums)
    received = [part for room in rooms for part in _parts(room, payload)][: payload.num_slices - 1]
    terms = [*received[: comm.rank], slices[comm.rank], *received[comm.rank :]]
    average = partial(_average_in_place, terms, comm.divisor, shard, accumulate)
    return comm.bind_exchange(payload, sums, terms).then(average)


def _parts(room: Tensor, payload: Payload) -> list[Tensor]:
    """The slices of a payload that some memory has room for."""
    count = room.nbytes // payload.slice_nbytes if payload.slice_nbytes else payload.num_slices
    flat = room.view(torch.uint8)[: count * payload.slice_nbytes].view(payload.dtype)
    return [flat[index * payload.slice_numel :][: payload.slice_numel] for index in range(count)]


def _average_in_place(terms: list[Tensor], divisor: float, shard: Tensor, accumulate: bool) -> None:
    total = terms[0]
    for term in terms[1:]:
        total.add_(term)
    total.div_(divisor)
    _bring(total, shard, terms[-1] if accumulate else None)


def _bring(total: Tensor, shard: Tensor, room: Tensor | None) -> None:
    """Write an average to a shard, cast to its dtype; or add it, so cast.

    Args:
        room: memory of an element of the average for each that is added; None: the shard is overwritten.
    """
    if room is None:
        shard.copy_(total)
    elif shard.dtype is total.dtype or shard.nbytes > room.nbytes:
        shard.add_(total)
    else:
        shard.add_(room.view(shard.dtype)[: len(shard)].copy_(total))


def _average(parts: list[tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]], divisor: float, accumulate: bool) -> None:
    """Sum terms in order, each converted in a room, divide, and bring the average to the shard if it is not there.

    Args:
        parts: of each part of the shard the terms, the room, where the sum is made, and the part.
    """
    for terms, room, total, shard in parts:
        total.copy_(terms[0])
        for term in terms[1:]:
            total.add_(room.copy_(term))
        total.div_(divisor)
        if total is not shard:
            _bring(total, shard, room if accumulate else None)
