"""A range of a flattened tensor as the fewest boxes that lie in it one after another.

A shard is a range; checkpoints of torch know boxes, by offsets and sizes. A box is contiguous in the range:
`flat[begin:][:numel].view(sizes)` is the box, without a copy. There are at most `2 * ndim - 1`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Box:
    """A part of a tensor: `sizes` elements from `offsets` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int
    """Index of its first element in the range."""

    def moved(self, offsets: Sequence[int]) -> "Box":
        """The box in a tensor of which the part that it lies in begins at some offsets."""
        return Box(tuple(map(sum, zip(self.offsets, offsets, strict=True))), self.sizes, self.begin)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.sizes)


def boxes_of(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut the elements `[start, stop)` of a row-major tensor into boxes, in order."""
    if not shape:
        return [Box((), (), 0)] if start < stop else []
    return list(_cut(tuple(shape), (), start, stop, 0, start)) if math.prod(shape) else []


def _cut(shape: tuple[int, ...], prefix: tuple[int, ...], low: int, high: int, base: int, start: int) -> Iterator[Box]:
    """The boxes of `[low, high)` of the part of the tensor under the index `prefix`, which begins at element `base`."""
    if low >= high:
        return
    rest = shape[len(prefix) + 1 :]
    stride = math.prod(rest)
    first, last = -(-low // stride), high // stride
    if first > last:  # the range lies inside of one slice of this dimension
        begin = last * stride
        yield from _cut(shape, (*prefix, last), low - begin, high - begin, base + begin, start)
        return
    if low < first * stride:  # the end of a slice
        begin = (first - 1) * stride
        yield from _cut(shape, (*prefix, first - 1), low - begin, stride, base + begin, start)
    if first < last:  # whole slices
        offsets = (*prefix, first) + (0,) * len(rest)
        yield Box(offsets, (1,) * len(prefix) + (last - first, *rest), base + first * stride - start)
    if last * stride < high:  # the beginning of a slice
        yield from _cut(shape, (*prefix, last), 0, high - last * stride, base + last * stride, start)
