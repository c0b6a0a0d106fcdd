"""Search for a packing within a capacity: branch and bound over pushed-down packings, driven by conflicts.

Every packing can be pushed down until each block rests on the ground or on another. The search builds such packings
from below. The lowest place that any block can have is next, and one of the blocks that can lie there is either put
there or *raised*: it must then rest on a block that is still to be placed.

Three numbers a section: its `level`, the top of what is placed; its `floor`, below which nothing more can start; its
`room`, how high the floor may be for the rest to fit. A block cannot be lower than any of its floors; a floor cannot be
lower than the lowest block left in its section. A floor above its room is a conflict.

    |        |_____________|      A conflict is explained by the sections whose levels alone force it. Choices that
    | gap    |   block     |      touch none of them are no part of the reason, and are left without trying their
    |________|_____________|      other side. That is what makes failures cheap: they are local, choices are not.

Sources: canonical packings and bounds by section, MiniMalloc (Moffitt, ASPLOS 2023); conflict-directed backjumping,
Prosser (Computational Intelligence 9(3), 1993); weights of what failed, Boussemart et al. (ECAI 2004). Deviations from
MiniMalloc: each choice is put or raise, which bounds what was refused; explanations; failed states are remembered.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxzero.memory.packing.instance import Instance, Ints

NEVER = 1 << 60
"""Above every offset: the lowest place of a placed block, the floor of a full section."""

Rule: TypeAlias = Literal["rank", "slack", "choices"]
"""Where to choose next, among the lowest places: by the blocks' rank alone, or in the section with the least slack or
the fewest blocks that could lie there, each over how often the section failed."""

Demand: TypeAlias = tuple[int, int, int]
"""Sections and blocks, as sets of bits, and a height: their floors and lowest places must be that high."""

Pending: TypeAlias = "tuple[tuple[int, int], Pending] | None"


@dataclass(slots=True)
class Node:
    """A state of the search: blocks in sections `[begin, end)` are placed next, those in `pending` after them."""

    begin: int
    end: int
    pending: Pending
    raised: list[int] = field(default_factory=list[int])  # here
    because: int = 0  # sections that explain why the blocks raised here cannot lie where they could
    states: list[bytes] = field(default_factory=list[bytes])
    block: int = -1  # the choice
    overwritten: tuple[Ints, ...] = ()  # by the choice: low, floor, level, room
    lowered: list[int] = field(default_factory=list[int])  # blocks no longer raised, now that they rest higher


class Search:
    """Tries to pack one instance, again and again: what failed once in a capacity is not tried there again."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.sizes: list[int] = instance.sizes.tolist()
        self.first: list[int] = instance.first.tolist()
        self.stop: list[int] = instance.stop.tolist()
        self.span = [(1 << b) - (1 << a) for a, b in zip(self.first, self.stop, strict=True)]
        self.begins: list[int] = instance.begins().tolist()
        num_sections = instance.num_sections
        overlap = (instance.first[:, None] < instance.stop) & (instance.first < instance.stop[:, None])
        np.fill_diagonal(overlap, False)
        self.apart = np.where(overlap, 0, NEVER)
        self.neighbours = [as_bits(row) for row in overlap]
        within = [(instance.first <= s) & (s < instance.stop) for s in range(num_sections)]
        self.members = [np.flatnonzero(row) for row in within]
        self.within = [as_bits(row) for row in within]
        self.flat_members = np.concatenate(self.members)
        self.member_at = np.cumsum([0, *map(len, self.members)])
        # The largest floor of a block's sections is the larger of two entries of a table of powers of two.
        power = np.frexp(instance.lengths.astype(np.float64))[1].astype(np.int64) - 1
        self.table = np.zeros((int(power.max()) + 1, num_sections), np.int64)
        self.head = power * num_sections + instance.first
        self.tail = power * num_sections + instance.stop - (1 << power)
        twins: dict[tuple[int, int, int], list[int]] = {}
        shapes = list(zip(self.first, self.stop, self.sizes, strict=True))
        for block, shape in enumerate(shapes):
            twins.setdefault(shape, []).append(block)
        self.twins = [twins[shape] for shape in shapes]
        self.all_failed: dict[int, dict[bytes, int]] = {}  # by capacity: the reasons of states
        self.impossible = False
        self.steps = 0

    def run(self, capacity: int, rule: Rule, rank: Ints, limit: int) -> Ints | None:
        """Search once.

        Args:
            capacity: the highest end of a block that is allowed.
            rule: where to choose next.
            rank: of each block, all different; among those that can be put in a place, the lowest goes first.
            limit: of steps.

        Returns:
            Offsets, or None: the limit was reached, or there is no packing in this capacity (`impossible`).
        """
        self.reset(capacity, rule, rank)
        node, choices = Node(0, self.instance.num_sections, None), list[Node]()
        while self.steps < limit:
            self.steps += 1
            why = self.examine(node)
            if why:
                why = self.give_up(node, why)
            else:
                why = self.put(node)
                choices.append(node)
                if not why:
                    below = self.after(node)
                    if below is None:
                        return self.offsets
                    node = below
                    continue
            above = self.backtrack(choices, why)
            if above is None:
                self.impossible = True
                return None
            node = above
        return None

    def reset(self, capacity: int, rule: Rule, rank: Ints) -> None:
        instance, num_sections = self.instance, self.instance.num_sections
        self.capacity, self.impossible = capacity, False
        self.failed = self.all_failed.setdefault(capacity, {})
        self.rule, self.rank, self.steps = rule, rank, 0
        self.offsets = np.zeros(instance.num_blocks, np.int64)
        self.low = np.zeros(instance.num_blocks, np.int64)
        self.top = self.capacity - instance.sizes  # the highest place of each block that is not placed
        self.unplaced = (1 << instance.num_blocks) - 1
        self.raised = np.zeros(instance.num_blocks, np.bool_)
        self.level = np.zeros(num_sections, np.int64)
        self.floor = np.zeros(num_sections, np.int64)
        self.left = instance.load
        self.room = self.capacity - self.left
        self.weight = np.ones(num_sections)
        self.crossing = instance.covering(instance.stop - 1, 1)  # blocks to place that are in a section and the next

    def examine(self, node: Node) -> int:
        """Choose a block for this node, or say which sections explain that there is no packing from here."""
        demand = self.propagate(node.begin, node.end)
        if demand:
            return self.explain(demand)
        begin, end = self.begins[node.begin], self.begins[node.end]
        state = blake2b(self.low[begin:end].tobytes(), digest_size=16)
        state.update(self.raised[begin:end].tobytes())
        state.update(self.level[node.begin : node.end].tobytes())
        node.states.append(state.digest())
        why = self.failed.get(state.digest(), 0)
        if not why:
            node.block = self.choose(node)
        return why

    def propagate(self, begin: int, end: int) -> Demand | None:
        """Raise floors and lowest places until nothing changes; if that cannot be, the demand that is too high."""
        blocks = slice(self.begins[begin], self.begins[end])
        low, floor, room = self.low[blocks], self.floor[begin:end], self.room[begin:end]
        members = self.flat_members[self.member_at[begin] : self.member_at[end]]
        member_at = self.member_at[begin:end] - self.member_at[begin]
        raised = np.flatnonzero(self.raised[blocks])
        apart = self.apart[blocks, blocks][raised]
        while True:
            np.maximum(low, self.highest_floors(begin, end), out=low)
            if len(raised):
                on_others = (apart + (low + self.instance.sizes[blocks])).min(axis=1)
                low[raised] = np.maximum(low[raised], on_others)
            lowest = np.minimum.reduceat(self.low.take(members), member_at)
            np.maximum(lowest, floor, out=lowest)
            done = np.array_equal(lowest, floor)
            floor[:] = lowest
            if (floor > room).any():
                section = begin + int((floor > room).argmax())
                self.weight[section] += 1
                return 1 << section, 0, int(self.room[section]) + 1
            if (low > self.top[blocks]).any():
                block = blocks.start + int((low > self.top[blocks]).argmax())
                self.weight[self.first[block]] += 1
                return 0, 1 << block, int(self.top[block]) + 1
            if done:
                return None

    def highest_floors(self, begin: int, end: int) -> Ints:
        """For each block that starts in `[begin, end)`, the highest floor of its sections."""
        self.table[0, begin:end] = self.floor[begin:end]
        for power in range(1, min(len(self.table), (end - begin).bit_length())):
            half = 1 << (power - 1)
            until = end - 2 * half + 1
            below = self.table[power - 1]
            np.maximum(below[begin:until], below[begin + half : until + half], out=self.table[power, begin:until])
        flat, blocks = self.table.reshape(-1), slice(self.begins[begin], self.begins[end])
        return np.maximum(flat.take(self.head[blocks]), flat.take(self.tail[blocks]))

    def choose(self, node: Node) -> int:
        """One of the blocks whose lowest place is the lowest of all, and that can lie there."""
        begin, blocks = self.begins[node.begin], slice(self.begins[node.begin], self.begins[node.end])
        lowest = self.low[blocks].min()
        choices = np.flatnonzero((self.low[blocks] == lowest) & ~self.raised[blocks]) + begin
        if self.rule != "rank":
            sections = np.flatnonzero(self.floor[node.begin : node.end] == lowest) + node.begin
            if self.rule == "slack":
                measure = self.room[sections] - lowest + 1
            else:
                measure = np.array([(self.low[self.members[s]] <= self.room[s]).sum() for s in sections.tolist()])
            section = sections[(measure / self.weight[sections]).argmin()]
            first, stop = self.instance.first[choices], self.instance.stop[choices]
            choices = choices[(first <= section) & (section < stop)]
        return int(choices[self.rank[choices].argmin()])

    def put(self, node: Node) -> int:
        """Place the node's block at its lowest place; the section that then has no room for the rest, if any."""
        block, first, stop = node.block, self.first[node.block], self.stop[node.block]
        blocks = slice(self.begins[node.begin], self.begins[node.end])
        offset = int(self.low[block])
        end = offset + self.sizes[block]
        changed = self.low[blocks], self.floor[node.begin : node.end], self.level[first:stop], self.room[first:stop]
        node.overwritten = tuple(values.copy() for values in changed)
        node.lowered = [
            other
            for other in (np.flatnonzero(self.raised[blocks]) + blocks.start).tolist()
            if self.first[other] < stop
            and first < self.stop[other]
            and self.level[self.first[other] : self.stop[other]].max() < end
        ]
        self.raised[node.lowered] = False
        self.offsets[block] = offset
        self.unplaced ^= 1 << block
        self.low[block], self.top[block] = NEVER, 4 * NEVER
        self.level[first:stop] = self.floor[first:stop] = end
        self.left[first:stop] -= self.sizes[block]
        self.crossing[first : stop - 1] -= 1
        self.room[first:stop] = np.where(self.left[first:stop] > 0, self.room[first:stop] + self.sizes[block], NEVER)
        full = self.room[first:stop] < end
        return 1 << (first + int(full.argmax())) if full.any() else 0

    def take(self, node: Node) -> None:
        """Undo `put`."""
        block, first, stop = node.block, self.first[node.block], self.stop[node.block]
        low, floor, self.level[first:stop], self.room[first:stop] = node.overwritten
        self.low[self.begins[node.begin] : self.begins[node.end]] = low
        self.floor[node.begin : node.end] = floor
        self.left[first:stop] += self.sizes[block]
        self.crossing[first : stop - 1] += 1
        self.top[block] = self.capacity - self.sizes[block]
        self.unplaced ^= 1 << block
        self.raised[node.lowered] = True

    def after(self, node: Node) -> Node | None:
        """What to place next: sections that no block connects any more are apart, those with the least slack first."""
        cuts = (np.flatnonzero(self.crossing[node.begin : node.end - 1] == 0) + node.begin + 1).tolist()
        parts = [
            (float(((self.room[a:b] - self.level[a:b]) / self.weight[a:b]).min()), a, b)
            for a, b in zip([node.begin, *cuts], [*cuts, node.end], strict=True)
            if self.room[a] < NEVER
        ]
        pending = node.pending
        for _, begin, end in sorted(parts, reverse=True):
            pending = ((begin, end), pending)
        return Node(*pending[0], pending[1]) if pending else None

    def backtrack(self, choices: list[Node], why: int) -> Node | None:
        """Undo choices up to the latest that is part of the reason and raise its block instead; None: there is none."""
        while choices:
            node = choices.pop()
            block = node.block
            self.take(node)
            if why & self.span[block]:
                first, stop, offset = self.first[block], self.stop[block], int(self.low[block])
                node.because |= why | self.span[block]
                if self.level[first:stop].min() < offset:
                    node.because |= self.explain((self.span[block], 0, offset))
                alike = [twin for twin in self.twins[block] if self.unplaced >> twin & 1 and not self.raised[twin]]
                self.raised[alike] = True
                node.raised += alike
                return node
            why = self.give_up(node, why)
        return None

    def give_up(self, node: Node, why: int) -> int:
        """Leave a node, remembered as failed if the reason is in its sections; the reason."""
        self.raised[node.raised] = False
        if why & ((1 << node.end) - (1 << node.begin)):
            why |= node.because
            self.failed.update(dict.fromkeys(node.states, why))
        return why

    def explain(self, demand: Demand) -> int:
        """Sections whose levels, with the blocks to place that are in them, force a demand.

        By value, the highest first, so that each block and section is asked for its reasons once.
        """
        sections, blocks, value = demand
        asked = {value: blocks}  # blocks by how high they must be
        reason, seen_sections, seen_blocks = 0, 0, 0
        while asked:
            value = max(asked)
            blocks = asked.pop(value) & self.unplaced & ~seen_blocks
            if not blocks and not sections:
                continue
            level, floor = as_bits(self.level >= value), as_bits(self.floor >= value)
            while True:
                reason |= sections
                seen_sections |= sections
                for section in ones(sections & ~level):
                    blocks |= self.within[section]
                blocks &= self.unplaced & ~seen_blocks
                if not blocks:
                    break
                seen_blocks |= blocks
                sections = 0
                for block in ones(blocks):
                    span = self.span[block]
                    enough = level & span
                    if not enough:
                        reason |= span
                        sections |= floor & span
                        if self.raised[block]:
                            self.ask_neighbours(block, value, self.unplaced & ~seen_blocks, asked)
                    elif not enough & reason:
                        reason |= enough & -enough
                sections &= ~seen_sections
            sections = 0
        return reason

    def ask_neighbours(self, block: int, value: int, among: int, asked: dict[int, int]) -> None:
        """A raised block rests on a neighbour: for it to be at `value`, every neighbour must end there or above."""
        for other in ones(self.neighbours[block] & among):
            height = value - self.sizes[other]
            if height > 0:
                asked[height] = asked.get(height, 0) | 1 << other


def as_bits(flags: NDArray[np.bool_]) -> int:
    """Bit `i` is `flags[i]`."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def ones(bits: int) -> Iterator[int]:
    """The positions of the bits that are set."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
