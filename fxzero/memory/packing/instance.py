"""What is packed: blocks of one size each over a run of sections, all that placing them depends on.

position:   0    1    2    3    4    5    6         A section is a largest set of buffers that live together.
a           [=========]                             Between two of them a buffer ends and then one starts, so
b                [==============]                   sections 0 {a, b} and 1 {b, c} say all about these lives,
c                          [=============]          however many positions there are.
section:    0    0    0    1    1    1    1
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Instance:
    """Blocks in order of their first section; block `i` needs `sizes[i]` in each of sections `[first[i], stop[i])`."""

    sizes: Ints
    first: Ints
    stop: Ints

    @property
    def num_blocks(self) -> int:
        return len(self.sizes)

    @property
    def num_sections(self) -> int:
        return int(self.stop.max())

    @property
    def lengths(self) -> Ints:
        """The number of sections of each block."""
        return self.stop - self.first

    @property
    def load(self) -> Ints:
        """The sum of the sizes in each section: no packing is lower than the largest."""
        return self.covering(self.stop, self.sizes)

    def covering(self, stop: Ints, values: Ints | int) -> Ints:
        """`[num_sections]`: the sum of the values of the blocks that cover each section, block `i` up to `stop[i]`."""
        change = np.zeros(self.num_sections + 1, np.int64)
        np.add.at(change, self.first, values)
        np.subtract.at(change, stop, values)
        return change.cumsum()[:-1]

    def contention(self) -> Ints:
        """For each block, the largest load of its sections."""
        load = self.load
        largest = [load[first:stop].max() for first, stop in zip(self.first, self.stop, strict=True)]
        return np.array(largest, dtype=np.int64)

    def begins(self) -> Ints:
        """`[num_sections + 1]`: the number of blocks that start before each section."""
        return np.searchsorted(self.first, np.arange(self.num_sections + 1))

    def peak(self, offsets: Ints) -> int:
        """The highest end of a block."""
        return int((offsets + self.sizes).max())


def sections(starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """The first section of each buffer and the one after its last; `ends` are included in a buffer's life."""
    num = len(starts)
    order = np.argsort(np.concatenate([2 * starts, 2 * ends + 1]), kind="stable")
    is_end = order >= num
    number = np.zeros(2 * num, np.int64)
    number[order[1:]] = (is_end[:-1] & ~is_end[1:]).cumsum()
    return number[:num], number[num:] + 1


def components(sizes: Ints, first: Ints, stop: Ints) -> Iterator[tuple[Ints, Instance]]:
    """Parts that share no section, the highest load first: the indices of their blocks, and the part.

    Args:
        sizes: of each block, above 0.
        first: section.
        stop: the section after its last.
    """
    order = np.lexsort((-sizes, -stop, first))
    reach = np.maximum.accumulate(stop[order])
    cuts = np.flatnonzero(first[order][1:] >= reach[:-1]) + 1
    parts: list[tuple[Ints, Instance]] = []
    for blocks in np.split(order, cuts):
        base = first[blocks[0]]
        parts.append((blocks, Instance(sizes[blocks], first[blocks] - base, stop[blocks] - base)))
    yield from sorted(parts, key=lambda part: -int(part[1].load.max()))
