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
from fxzero.graph.nodes import tensor_bytes


class Spans:
    """The memory of some tensors, told by address."""

    def __init__(self, tensors: Sequence[Tensor], first: "Spans | None" = None) -> None:
        """
        Args:
            first: that of tensors whose indices come before; it stays as it is.
        """
        self.begins, self.ends, self.indices = ([], [], []) if first is None else first.copies()
        self._count = 0 if first is None else first._count
        for tensor in tensors:
            if tensor.numel():
                begin = tensor.data_ptr()
                at = bisect.bisect(self.begins, begin)
                self.begins.insert(at, begin)
                self.ends.insert(at, begin + tensor_bytes(tensor))
                self.indices.insert(at, self._count)
            self._count += 1

    def copies(self) -> tuple[list[int], list[int], list[int]]:
        """Copies of the first address, the address behind the last, and the index of each, in order of addresses."""
        return self.begins.copy(), self.ends.copy(), self.indices.copy()


class Saved:
    """Hooks on the tensors that autograd saves in one forward of an island.

    It never holds an output: the graph holds these hooks, and nothing would collect the circle.

    Args:
        now: weights, then inputs, as forward has them.
        spans: of them.
        kept: indices among them of those that are there in backward.
    """

    def __init__(self, now: Sequence[Tensor | None], spans: Spans, kept: Collection[int]) -> None:
        self.now = now
        """Weights, then inputs, as the running phase has them; empty between the phases."""
        self._begins, self._ends, self._indices = spans.begins, spans.ends, spans.indices
        self._kept = kept

    def pack(self, tensor: Tensor) -> Any:
        """What is saved in the place of a tensor: itself, an index, or a place in what has the index."""
        try:
            begin = tensor.data_ptr()
        except RuntimeError:  # sparse, say
            return tensor.detach()
        at = bisect.bisect_right(self._begins, begin) - 1
        if at < 0 or begin >= self._ends[at]:
            return tensor.detach()
        index = self._indices[at]
        base = self.now[index]
        if index not in self._kept or base is None:
            return tensor.detach().clone()
        is_view = tensor.is_conj() or tensor.is_neg() or tensor.dtype is not base.dtype
        if not is_view and tensor.shape == base.shape and tensor.stride() == base.stride():
            return index
        if begin + tensor_bytes(tensor) > self._ends[at]:
            return tensor.detach().clone()  # it lies over two weights
        offset = (begin - self._begins[at]) // tensor.element_size()
        return index, offset, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()

    def unpack(self, packed: Any) -> Tensor:
        """What backward reads."""
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, int):
            whole = self.now[packed]
            assert whole is not None
            return whole
        index, offset, dtype, shape, stride, conj, neg = packed
        base = self.now[index]
        assert base is not None
        if base.dtype != dtype:
            base = torch.view_as_real(base) if base.is_complex() and not dtype.is_complex else base.view(dtype)
        found = base.as_strided(shape, stride, int(base.storage_offset()) + offset)
        found = found.conj() if conj else found
        return torch_internals.negated_view(found) if neg else found


class NotingSaved(Saved):
    """The same in a probe, which learns what is saved."""

    def __init__(self, now: Sequence[Tensor | None], spans: Spans, kept: Collection[int]) -> None:
        super().__init__(now, spans, range(len(now)))
        self.found: set[int] = set()
        """Indices of what is saved by its place."""
        self.held_bytes = 0
        """Bytes of what is saved as it is."""

    def pack(self, tensor: Tensor) -> Any:
        """Note it, and save it."""
        packed = super().pack(tensor)
        if isinstance(packed, Tensor):
            if packed.layout is torch.strided:
                self.held_bytes += packed.numel() * packed.element_size()
        else:
            self.found.add(packed if isinstance(packed, int) else packed[0])
        return packed
