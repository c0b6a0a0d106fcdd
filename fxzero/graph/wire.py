"""Formats in which a bucket travels in fewer bytes: a cast, or int8 with a scale for each block.

    a row: one rank's shard of S elements
    cast        [ S elements of the narrower dtype ]
    quantised   [ S int8 values | fp32 scale of block 0, 1, ... | pad ]      block i: elements [256 i, 256 (i + 1))

A collective moves a row for each rank, in rank order. Blocks are cut from the shard, so that each rank quantises on its
own; the last block may be shorter.
"""

from dataclasses import dataclass, replace

import torch

from fxzero.graph.layout import Payload, align

BLOCK_NUMEL = 256
"""Number of elements that share a scale. Scales add 1.6 % to the bytes of the values."""
SCALE_DTYPE = torch.float32
"""Dtype of scales. A narrower one would save 0.8 % of the bytes. But bfloat16 rounds scales by up to 0.4 %, so that the
largest value of a block could be clipped, and float16 has too few exponents for the scales of small weights."""
ROW_BYTES = 16
"""Alignment of rows, as NCCL's widest loads need it."""
MAX_VALUE = 127
"""Largest magnitude of a quantised element. The range is symmetric, so that zero stays zero."""


@dataclass(frozen=True)
class WireFormat:
    """The format in which the elements of a bucket travel."""

    dtype: torch.dtype
    block_numel: int | None = None
    """Number of elements that share a scale; None for a cast, which has no scales."""

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return name if self.block_numel is None else f"{name}/{self.block_numel}"

    def num_scales(self, shard_numel: int) -> int:
        """Number of blocks in a shard."""
        return 0 if self.block_numel is None else -(-shard_numel // self.block_numel)

    def row_numel(self, shard_numel: int) -> int:
        """Number of elements of `dtype` in the row of a shard, scales and pad included."""
        nbytes = shard_numel * self.dtype.itemsize + self.num_scales(shard_numel) * SCALE_DTYPE.itemsize
        return align(nbytes, ROW_BYTES) // self.dtype.itemsize


def check_gather_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError if parameters cannot travel in this dtype; the message lists the dtypes."""
    if dtype not in (torch.bfloat16, torch.int8):
        raise ValueError(f"dtype is {dtype}; gathers travel as torch.bfloat16 or torch.int8")


def check_reduce_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError if gradients cannot travel in this dtype; the message lists the dtypes."""
    if dtype is not torch.bfloat16:
        raise ValueError(f"dtype is {dtype}; reduce-scatters travel as torch.bfloat16")


def gather_format(dtype: torch.dtype) -> WireFormat:
    """The format of gathers that travel in a dtype: int8 has a scale for each block, bfloat16 is a cast."""
    return WireFormat(dtype, None if dtype.is_floating_point else BLOCK_NUMEL)


def on_wire(payload: Payload, format: WireFormat | None) -> Payload:
    """A payload in a wire format; the payload itself if the format is None."""
    if format is None:
        return payload
    return replace(payload, slice_numel=format.row_numel(payload.slice_numel), dtype=format.dtype)


def narrowed(payload: Payload, format: WireFormat | None) -> Payload:
    """A payload in a wire format; the payload itself if it is of integers, or the format saves no bytes."""
    if not payload.dtype.is_floating_point:
        return payload
    travels = on_wire(payload, format)
    return travels if travels.nbytes < payload.nbytes else payload


def split_rows(rows: torch.Tensor, shard_numel: int, format: WireFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the values `[..., shard_numel]` and scales `[..., num_scales]` in quantised rows `[..., row_numel]`."""
    end = shard_numel + format.num_scales(shard_numel) * SCALE_DTYPE.itemsize
    return rows[..., :shard_numel], rows[..., shard_numel:end].view(SCALE_DTYPE)
