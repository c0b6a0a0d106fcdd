"""Best fit on a skyline: fill the lowest gap with the block that matters most there.

    height                          The skyline is the top of what is placed, section by section. A gap is a stretch
      |  ____        ______         between higher neighbours; only blocks whose whole life lies in it fit without
      | |    |______|      |        waste. The gap's critical section has the most left to place; of the blocks that
      | |    |  gap |      |___     fit, one that crosses it goes first. If none fits, the gap is filled up to its
      +------------------------->   lower neighbour, and that much is wasted.
                    section

Source: best fit of Burke et al. (Operations Research 52(4), 2004), on fixed lives by Sekiyama et al.
(arXiv:1804.10001); deviation: the critical section first, and several measures of a block, of which the best result
counts.
"""

import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fxzero.memory.packing.instance import Instance, Ints

WORK = 64_000_000
"""Array elements that all passes together may look at: about a second."""

WORK_PER_STEP = 500
"""What a step costs besides its array elements, in elements."""


def best_fit(instance: Instance, target: int) -> Ints:
    """The offsets of the lowest packing found; stops at `target`."""
    best, peak, work = np.zeros(0, np.int64), -1, 0
    for priority in priorities(instance):
        skyline = Skyline(instance, priority)
        offsets = skyline.fill()
        if peak < 0 or instance.peak(offsets) < peak:
            best, peak = offsets, instance.peak(offsets)
        work += skyline.work
        if peak <= target or work + skyline.work > WORK:
            break
    return best


def priorities(instance: Instance) -> Iterator[NDArray[np.float64]]:
    """Measures by which one block goes before another, all above 0."""
    sizes, lengths = instance.sizes.astype(np.float64), instance.lengths.astype(np.float64)
    top = float(instance.load.max())
    yield lengths + sizes / (2 * top)
    yield lengths * sizes
    yield instance.contention() / top * 4 * len(sizes) + (lengths + 4) * (sizes / top + 1 / 32)
    yield sizes + lengths / (2 * instance.num_sections)
    yield (lengths + 4) * (sizes / top + 1 / 32)


class Skyline:
    """One pass over an instance."""

    def __init__(self, instance: Instance, priority: NDArray[np.float64]) -> None:
        self.instance = instance
        self.priority = priority.copy()  # -1 once placed
        self.left = instance.load.copy()  # what is still to place, by section
        self.begins: list[int] = instance.begins().tolist()
        self.work = 0
        # Stretches of equal height: height and end by first section, and first section by end.
        self.height: dict[int, int] = {}
        self.end: dict[int, int] = {}
        self.start: dict[int, int] = {}
        self.lowest: list[tuple[int, int]] = []  # heap of (height, first section); outdated ones stay
        self.put(0, instance.num_sections, 0)

    def fill(self) -> Ints:
        """Place every block: their offsets."""
        offsets = np.zeros(self.instance.num_blocks, np.int64)
        sizes: list[int] = self.instance.sizes.tolist()
        firsts: list[int] = self.instance.first.tolist()
        stops: list[int] = self.instance.stop.tolist()
        to_place = len(sizes)
        while to_place:
            height, start = heapq.heappop(self.lowest)
            if self.height.get(start) != height:
                continue
            end = self.end[start]
            block = self.choose(start, end)
            self.remove(start)
            if block < 0:
                before, after = self.start.get(start, -1), end
                self.put(start, end, min(self.height[i] for i in (before, after) if i in self.height))
                continue
            offsets[block] = height
            self.priority[block] = -1
            self.left[firsts[block] : stops[block]] -= sizes[block]
            to_place -= 1
            self.put(start, firsts[block], height)
            self.put(stops[block], end, height)
            self.put(firsts[block], stops[block], height + sizes[block])
        return offsets

    def choose(self, start: int, end: int) -> int:
        """The block for the gap `[start, end)`, or -1 if none fits."""
        critical = start + int(self.left[start:end].argmax())
        if not self.left[critical]:
            return -1
        begin = self.begins[start]
        block = self.best(begin, self.begins[critical + 1], critical, end)
        return block if block >= 0 else self.best(begin, self.begins[end], start, end)

    def best(self, begin: int, until: int, section: int, end: int) -> int:
        """Of blocks `[begin, until)`, the first by priority that stops after `section` and by `end`; or -1."""
        self.work += until - begin + WORK_PER_STEP
        if begin == until:
            return -1
        stop = self.instance.stop[begin:until]
        priority = np.where((stop > section) & (stop <= end), self.priority[begin:until], -1)
        block = int(priority.argmax())
        return begin + block if priority[block] > 0 else -1

    def put(self, start: int, end: int, height: int) -> None:
        """Add a stretch, in one with neighbours of its height."""
        if start == end:
            return
        before = self.start.get(start, -1)
        if self.height.get(before) == height:
            self.remove(before)
            start = before
        if self.height.get(end) == height:
            after, end = end, self.end[end]
            self.remove(after)
        self.height[start], self.end[start], self.start[end] = height, end, start
        heapq.heappush(self.lowest, (height, start))

    def remove(self, start: int) -> None:
        del self.height[start], self.start[self.end.pop(start)]
