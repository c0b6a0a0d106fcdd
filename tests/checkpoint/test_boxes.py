"""A range of a flattened tensor as boxes: they cover it in order, each is contiguous in it, and there are few."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxzero.checkpoint.boxes import Box, boxes_of


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_boxes_are_the_range(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = torch.arange(numel)
    flat, found = whole[start:stop], boxes_of(shape, start, stop)
    assert len(found) <= max(2 * len(shape) - 1, 1)
    end = 0
    for box in found:
        assert box.begin == end
        end += box.numel
        part = tuple(slice(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True))
        assert torch.equal(flat[box.begin : end].view(box.sizes), whole.view(shape)[part])
    assert end == stop - start


def test_a_range_that_ends_inside_of_rows() -> None:
    assert boxes_of((4, 3), 2, 10) == [Box((0, 2), (1, 1), 0), Box((1, 0), (2, 3), 1), Box((3, 0), (1, 1), 7)]
    assert boxes_of((), 0, 1) == [Box((), (), 0)]
    assert boxes_of((), 1, 1) == []
