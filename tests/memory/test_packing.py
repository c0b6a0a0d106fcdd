"""The memory planner: every packing against a checker of its own, small ones against the optimum, known hard ones."""

import csv
import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxzero.memory.packing import pack

DATA = Path(__file__).parents[1] / "data" / "minimalloc"
Lives = tuple[list[int], list[int], list[int]]
"""Sizes, starts, ends."""


def bound(sizes: list[int], starts: list[int], ends: list[int]) -> int:
    """The largest sum of live sizes."""
    lives = list(zip(sizes, starts, ends, strict=True))
    return max((sum(size for size, start, end in lives if start <= at <= end) for at in set(starts)), default=0)


def checked_peak(sizes: list[int], starts: list[int], ends: list[int], offsets: list[int]) -> int:
    """The highest end of a buffer; fails if two that live together share a unit."""
    assert len(offsets) == len(sizes)
    assert all(offset >= 0 for offset in offsets)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        together = starts[i] <= ends[j] and starts[j] <= ends[i]
        share = offsets[i] < offsets[j] + sizes[j] and offsets[j] < offsets[i] + sizes[i]
        assert not (together and share and sizes[i] and sizes[j]), (i, j)
    return max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)


def lowest_peak(sizes: list[int], starts: list[int], ends: list[int]) -> int:
    """The optimum: the best of first fit in every order, since some order builds a lowest packing."""
    best = sum(sizes)
    for order in itertools.permutations(range(len(sizes))):
        offsets: dict[int, int] = {}
        for i in order:
            taken = [
                (offsets[j], offsets[j] + sizes[j]) for j in offsets if starts[i] <= ends[j] and starts[j] <= ends[i]
            ]
            offsets[i] = next(
                at
                for at in sorted({0, *(end for _, end in taken)})
                if all(at + sizes[i] <= begin or end <= at for begin, end in taken)
            )
        best = min(best, max((offsets[i] + sizes[i] for i in offsets), default=0))
    return best


@st.composite
def lives(draw: st.DrawFn, most: int = 40, least_size: int = 0) -> Lives:
    number = draw(st.integers(0, most))
    sizes = [draw(st.integers(least_size, 30)) for _ in range(number)]
    starts = [draw(st.integers(-5, 20)) for _ in range(number)]
    return sizes, starts, [start + draw(st.integers(0, 10)) for start in starts]


def random_lives(number: int, seed: int) -> Lives:
    numbers = random.Random(seed)
    starts = [numbers.randrange(number) for _ in range(number)]
    return [numbers.randint(1, 4096) for _ in starts], starts, [start + numbers.randrange(40) for start in starts]


def transformer(num_layers: int, sizes: list[int]) -> Lives:
    """For each layer some buffers in forward, the same again in backward, and one that lives from one to the other."""
    buffers: list[tuple[int, int, int]] = []
    last = 4 * num_layers
    for layer in range(num_layers):
        forward, backward = 2 * layer, last - 2 * layer
        buffers += [(size, forward, forward + 3) for size in sizes]
        buffers += [(size, backward - 3, backward) for size in sizes]
        buffers.append((sizes[0], forward + 1, backward))
    unzipped = [list(column) for column in zip(*buffers, strict=True)]
    return unzipped[0], unzipped[1], unzipped[2]


def minimalloc(name: str) -> Lives:
    with (DATA / f"{name}.1048576.csv").open() as file:
        rows = list(csv.DictReader(file))
    return (
        [int(row["size"]) for row in rows],
        [int(row["lower"]) for row in rows],
        [int(row["upper"]) - 1 for row in rows],
    )


@given(lives(), st.sampled_from([1, 3, 256]))
@settings(max_examples=200, deadline=None)
def test_buffers_that_live_together_never_share_a_unit(buffers: Lives, alignment: int) -> None:
    offsets = pack(*buffers, alignment=alignment, effort=4)
    assert checked_peak(*buffers, offsets) >= bound(*buffers)
    assert all(offset % alignment == 0 for offset in offsets)
    assert all(type(offset) is int for offset in offsets)
    assert offsets == pack(*buffers, alignment=alignment, effort=4)


@given(lives(most=6, least_size=1))
@settings(max_examples=60, deadline=None)
def test_few_buffers_are_packed_as_low_as_any_order_of_first_fit(buffers: Lives) -> None:
    assert checked_peak(*buffers, pack(*buffers)) == lowest_peak(*buffers)


def test_peak_counts_whole_steps_of_alignment() -> None:
    offsets = pack([1, 257, 1], [0, 0, 0], [0, 0, 0], alignment=256)
    assert sorted(offsets)[0] == 0
    assert max(offsets) <= 768
    assert all(offset % 256 == 0 for offset in offsets)


def test_no_buffers_or_empty_ones_need_no_place() -> None:
    assert pack([], [], []) == []
    assert pack([0, 0], [0, 0], [1, 1]) == [0, 0]
    assert pack([5, 0, 5], [0, 0, 1], [1, 9, 2]) in ([0, 0, 5], [5, 0, 0])


def test_end_is_part_of_a_life() -> None:
    assert sorted(pack([4, 4], [0, 1], [1, 2])) == [0, 4]
    assert pack([4, 4], [0, 2], [1, 3]) == [0, 0]


@pytest.mark.parametrize("number", [1, 2, 12, 48])
@pytest.mark.parametrize("sizes", [[64], [64, 64, 64], [96, 32, 64, 7]])
def test_schedule_of_a_transformer_meets_the_bound(number: int, sizes: list[int]) -> None:
    buffers = transformer(number, sizes)
    assert checked_peak(*buffers, pack(*buffers)) == bound(*buffers)


@pytest.mark.parametrize("seed", range(3))
def test_two_thousand_random_buffers_are_close_to_the_bound(seed: int) -> None:
    buffers = random_lives(2000, seed)
    assert checked_peak(*buffers, pack(*buffers)) <= 1.05 * bound(*buffers)


def test_sizes_and_lives_of_all_magnitudes_are_close_to_the_bound() -> None:
    numbers = random.Random(0)
    starts = [numbers.randrange(1500) for _ in range(1500)]
    sizes = [1 << numbers.randrange(13) for _ in starts]
    ends = [start + int(2.72 ** numbers.uniform(0, 6)) for start in starts]
    assert checked_peak(sizes, starts, ends, pack(sizes, starts, ends)) <= 1.05 * bound(sizes, starts, ends)


@pytest.mark.parametrize(
    "name", ["A", "B", "C", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in "DEFGHIK")]
)
def test_challenging_instance_fits_its_capacity(name: str) -> None:
    buffers = minimalloc(name)
    assert checked_peak(*buffers, pack(*buffers)) <= 1_048_576


def test_search_improves_on_best_fit_and_never_worsens_it() -> None:
    buffers = minimalloc("B")
    peaks = [checked_peak(*buffers, pack(*buffers, effort=effort)) for effort in (0, 32)]
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize(
    ("buffers", "options", "message"),
    [
        (([-1], [0], [0]), {}, "Buffer 0 has size -1"),
        (([1, 1], [0, 3], [0, 2]), {}, "Buffer 1 has size 1 and lives from 3 to 2"),
        (([1], [0], [0]), {"alignment": 0}, "alignment must be at least 1"),
        (([1], [0], [0]), {"effort": -1}, "effort at least 0"),
        (([1, 2], [0], [0]), {}, "shorter"),
    ],
)
def test_bad_arguments_are_refused(buffers: Lives, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(*buffers, **options)
