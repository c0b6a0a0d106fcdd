"""Tensors of several dtypes as one run of bytes, in which they travel from rank to rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxzero.graph.layout import align

_ALIGNMENT_BYTES = 16
"""Where each tensor begins in a message, so that it can be seen in its dtype."""


class Message:
    """One run of bytes, seen as flat tensors one after another.

    Args:
        sizes: the elements and the dtype of each.
    """

    def __init__(self, sizes: Sequence[tuple[int, torch.dtype]], device: torch.device) -> None:
        ends = [numel * dtype.itemsize for numel, dtype in sizes]
        self.bytes = torch.empty(sum(align(end, _ALIGNMENT_BYTES) for end in ends), dtype=torch.uint8, device=device)
        self.tensors: list[Tensor] = []
        begin = 0
        for (_, dtype), nbytes in zip(sizes, ends, strict=True):
            self.tensors.append(self.bytes[begin : begin + nbytes].view(dtype))
            begin += align(nbytes, _ALIGNMENT_BYTES)

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Copy flat tensors into their places."""
        for place, tensor in zip(self.tensors, tensors, strict=True):
            place.copy_(tensor)
