"""Static memory planning: offsets for buffers of known sizes and lives, with the lowest peak that can be found.

    sizes, lives  ->  sections (instance.py)  ->  best fit (skyline.py)  ->  search below its peak (search.py)

Any packing is at least as high as the largest sum of live sizes. Best fit often reaches it, and then nothing is
searched. Otherwise capacities between the two are tried, the bound first, with limits counted in steps and never in
seconds: every rank decides the same. Instances too large for that get first fit (first_fit.py) as well.
"""

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fxzero.memory.packing.first_fit import MAX_OVERLAPS, first_fit, num_overlaps
from fxzero.memory.packing.instance import Instance, Ints, components, sections
from fxzero.memory.packing.search import Rule, Search
from fxzero.memory.packing.skyline import best_fit

__all__ = ["EFFORT", "pack"]

EFFORT = 35
"""Default limit: steps of search for every hundred pairs of blocks. A step takes 0.1 to 0.3 ms."""

FEW, MANY = 60, 400
"""Numbers of blocks below and above which that limit stays the same."""

STEPS_PER_BLOCK, MIN_STEPS = 4, 200
"""Steps before a search starts afresh in another way: most that succeed need 1 to 3 for each block."""

MAX_BLOCKS, MAX_AREA = 500, 20_000
"""Only instances with at most so many blocks, and pairs of a block and a section, are searched: a step looks at all."""


def pack(
    sizes: Sequence[int], starts: Sequence[int], ends: Sequence[int], *, alignment: int = 1, effort: int = EFFORT
) -> list[int]:
    """Offsets at which buffers that live together never share a byte.

    Args:
        sizes: of each buffer, 0 or more, in any unit.
        starts: the first position of each buffer's life.
        ends: the last position of each buffer's life, included.
        alignment: every offset is a multiple of it.
        effort: steps of search for every hundred pairs of buffers, where best fit is above the bound; 0 for none.

    Returns:
        The offset of each buffer; the same for the same arguments, on every machine.

    Raises:
        ValueError: a size or the effort is negative, a life ends before it starts, alignment is below 1, or the
                sequences differ in length.
    """
    if alignment < 1 or effort < 0:
        raise ValueError(f"alignment must be at least 1 and effort at least 0, not {alignment} and {effort}.")
    for index, (size, start, end) in enumerate(zip(sizes, starts, ends, strict=True)):
        if size < 0 or end < start:
            raise ValueError(f"Buffer {index} has size {size} and lives from {start} to {end}.")
    offsets = [0] * len(sizes)
    kept = [index for index, size in enumerate(sizes) if size]
    if not kept:
        return offsets
    blocks = np.array([-(-sizes[index] // alignment) for index in kept], np.int64)
    grid = math.gcd(*blocks.tolist())
    first, stop = sections(np.array([starts[i] for i in kept]), np.array([ends[i] for i in kept]))
    target = 0
    for indices, part in components(blocks // grid, first, stop):
        target = max(target, int(part.load.max()))  # a part may be as high as the parts before it
        placed = improve(part, best_fit(part, target), target, effort)
        target = max(target, part.peak(placed))
        for index, offset in zip(indices.tolist(), placed.tolist(), strict=True):
            offsets[kept[index]] = offset * grid * alignment
    return offsets


def improve(instance: Instance, offsets: Ints, target: int, effort: int) -> Ints:
    """A packing at most as high as `offsets`: searched for if the instance is small, else from first fit."""
    num = instance.num_blocks
    if instance.peak(offsets) <= target:
        return offsets
    if num <= MAX_BLOCKS and instance.lengths.sum() <= MAX_AREA:
        return tighten(instance, offsets, target, effort * min(max(num, FEW), MANY) ** 2 // 100)
    if num_overlaps(instance) > MAX_OVERLAPS:
        return offsets
    return min(offsets, first_fit(instance), key=instance.peak)


def tighten(instance: Instance, offsets: Ints, target: int, steps: int) -> Ints:
    """Search for a packing lower than `offsets`, until one reaches `target` or is proved lowest, or the steps are used.

    Each way to search tries the lowest capacity that may be possible, then halves the distance between the highest one
    at which it failed and the best packing so far, down to a share that is coarse in one round and fine in the next.
    """
    search, lowest, peak = Search(instance), target, instance.peak(offsets)
    limit = max(STEPS_PER_BLOCK * instance.num_blocks, MIN_STEPS)
    for rule, rank, share in ways(instance):
        capacity, failed, enough = lowest, lowest - 1, max(1, (peak - lowest) // share)
        while peak > lowest and steps and capacity < peak:
            placed = search.run(capacity, rule, rank, min(limit, steps))
            steps -= search.steps
            if placed is not None:
                offsets, peak = placed, instance.peak(placed)
            else:
                failed = capacity
            if search.impossible:
                lowest = capacity + 1
            if peak - failed <= enough:
                break
            capacity = (failed + peak) // 2
        if peak <= lowest or not steps:
            break
    return offsets


def ways(instance: Instance) -> Iterator[tuple[Rule, Ints, int]]:
    """Ways to search, without end: where to choose next, the ranks of the blocks, and the share for `tighten`.

    After the first round of ways the ranks are varied at random.
    """
    lengths, sizes, contention = instance.lengths, instance.sizes / instance.load.max(), instance.contention()
    same = np.zeros_like(lengths)
    measures: tuple[tuple[Rule, Ints, Ints | NDArray[np.float64]], ...] = (
        ("rank", same, lengths * sizes),
        ("choices", same, lengths * lengths * sizes),
        ("rank", contention, lengths),
        ("choices", same, lengths),
        ("slack", same, lengths),
        ("choices", contention, (lengths + 4) * (sizes + 1 / 32)),
    )
    numbers, spread, share = random.Random(1), 0.0, 4
    while True:
        vary = np.array([1 + spread * (numbers.random() - 0.5) for _ in range(instance.num_blocks)])
        for rule, before, measure in measures:
            yield rule, np.argsort(np.lexsort((-measure * vary, -before))), share
        spread, share = 0.3, 20 - share
