"""What the autograd graph of an island saves: weights and inputs as places, all else as it is.

Gathered weights lie in the arena, whose memory is another's between forward and backward; there they are gathered
again, elsewhere. So a saved tensor that lies in a weight, or in an input, is kept as the place in it, and read again in
backward. All may be views of one storage, so they are told by address.
"""

import bisect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.capture.islands.geometry import extent


class Spans:
    """The memory of some tensors."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        spans = [
            (tensor.data_ptr(), tensor.data_ptr() + extent(tensor), index)
            for index, tensor in enumerate(tensors)
            if tensor is not None and tensor.numel()
        ]
        spans.sort()
        self._begins = [begin for begin, _, _ in spans]
        self._spans = spans

    def find(self, tensor: Tensor) -> tuple[int, int] | None:
        """Index of the tensor in whose memory another one begins, and the offset in bytes; None outside of all.

        The index is -1 if it reaches beyond the end.
        """
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        begin = tensor.data_ptr()
        at = bisect.bisect_right(self._begins, begin) - 1
        if at < 0 or begin >= self._spans[at][1]:
            return None
        first, end, index = self._spans[at]
        return (index if begin + extent(tensor) <= end else -1), begin - first


class Saved:
    """Hooks on the tensors that autograd saves in one forward of an island.

    It never holds an output: the graph holds these hooks, and nothing would collect the circle.

    Args:
        kept: indices of the inputs that are there in backward.
        inputs, params: as forward has them.
    """

    def __init__(self, kept: Collection[int], inputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._num_inputs, self._kept = len(inputs), kept
        self.now: Sequence[Tensor | None] = ()
        """The inputs and the weights of the running backward."""
        self.spans = Spans([*inputs, *params])
        self.read_inputs: set[int] = set()
        """Indices of the inputs that were saved."""
        self.held_bytes = 0
        """Bytes of what is saved as it is."""

    def pack(self, tensor: Tensor) -> Any:
        """What is saved in the place of a tensor."""
        found = self.spans.find(tensor)
        if found is None:
            if tensor.layout is torch.strided:
                self.held_bytes += tensor.numel() * tensor.element_size()
            return tensor.detach()
        index, offset = found
        if 0 <= index < self._num_inputs:
            self.read_inputs.add(index)
        if index < 0 or (index < self._num_inputs and index not in self._kept):
            return tensor.detach().clone()
        conj, neg = tensor.is_conj(), tensor.is_neg()
        return index, offset // tensor.element_size(), tensor.dtype, tensor.shape, tensor.stride(), conj, neg

    def unpack(self, packed: Any) -> Tensor:
        """What backward reads."""
        if isinstance(packed, Tensor):
            return packed
        index, offset, dtype, shape, stride, conj, neg = packed
        base = self.now[index]
        assert base is not None
        if base.dtype != dtype:
            base = torch.view_as_real(base) if base.is_complex() and not dtype.is_complex else base.view(dtype)
        found = base.as_strided(shape, stride, int(base.storage_offset()) + offset)
        found = found.conj() if conj else found
        return torch_internals.negated_view(found) if neg else found
