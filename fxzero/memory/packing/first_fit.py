"""First fit, the largest block first: each at the lowest place that is free in all its sections.

Better than best fit where sizes differ by orders of magnitude: the small blocks fill what the large ones leave.
"""

import numpy as np

from fxzero.memory.packing.instance import Instance, Ints

MAX_OVERLAPS = 10_000_000
"""Above so many pairs of blocks that overlap, it would take seconds."""

NO_END = 1 << 62


def num_overlaps(instance: Instance) -> int:
    """Pairs of blocks that share a section."""
    started = np.searchsorted(instance.first, instance.stop)  # blocks are in order of their first section
    return int((started - np.arange(instance.num_blocks) - 1).sum())


def first_fit(instance: Instance) -> Ints:
    """The offset of each block."""
    offsets = np.zeros(instance.num_blocks, np.int64)
    # Of the blocks placed so far, in that order.
    first, stop, bottom, top = np.zeros((4, instance.num_blocks), np.int64)
    for count, block in enumerate(np.lexsort((instance.first, -instance.sizes)).tolist()):
        begin, end, size = instance.first[block], instance.stop[block], instance.sizes[block]
        taken = np.flatnonzero((first[:count] < end) & (stop[:count] > begin))
        taken = taken[bottom[taken].argsort(kind="stable")]
        gap_begins = np.concatenate([[0], np.maximum.accumulate(top[taken])])
        gap_ends = np.concatenate([bottom[taken], [NO_END]])
        offset = gap_begins[(gap_ends - gap_begins >= size).argmax()]
        offsets[block] = offset
        first[count], stop[count], bottom[count], top[count] = begin, end, offset, offset + size
    return offsets
