"""Find out whether compiled code of a region computes what its operators compute one by one, bit for bit.

It is tried on the device and in the geometry that it is compiled for, with numbers of four kinds:

near       ordinary numbers
far        numbers of all magnitudes, up to the largest and down to denormal ones
odd        zeros of both signs, infinities, NaN, the largest and smallest numbers: mixed, and often equal to each other
equal      one odd number throughout each input, so that elements at the end of a loop meet it too

Two NaNs count as equal, whatever their bits are.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxzero.graph.nodes import tensor_bytes
from fxzero.graph.regions import Region

KINDS = ("near", "far", "odd")
ELEMENTS = 2**17
"""Elements of the largest tensor that are tried of each of `KINDS`, within `SEEDS`."""
SEEDS = (2, 16)
"""The least and the most trials of each of `KINDS`."""
_DRAWN = 2**16 + 1
"""Numbers that are drawn of each kind; larger tensors repeat them."""


def differs(region: Region, compiled: Callable[[list[Any]], Sequence[Any]]) -> str | None:
    """How compiled code of a region differs from its operators, in words; None if no trial shows a difference.

    Args:
        compiled: takes inputs and places as a list, and returns the results without places.
    """
    for kind, inputs in _trials(region):
        expected, found = (_results(region, code, inputs) for code in (region, compiled))
        for index, (own, other) in enumerate(zip(expected, found, strict=True)):
            if count := _num_differing(own, other):
                return f"result {index} differs in {count:,} of {own.numel():,} elements, on {kind} numbers"
    return None


def _trials(region: Region) -> Iterator[tuple[str, list[Tensor]]]:
    largest = max(each.numel() for each in (*region.inputs, *(result.meta["val"] for result in region.results)))
    least, most = SEEDS
    chosen = random.Random(0)
    for kind in itertools.chain.from_iterable([KINDS] * min(max(ELEMENTS // largest, least), most)):
        yield kind, [_filled(each, _numbers(each.dtype, kind), chosen) for each in region.inputs]
    for index in range(len(_odd(torch.float32))):
        lists = [_odd(each.dtype) for each in region.inputs]
        # the first input goes through all of them, the others are anything
        picked = [
            each[index % len(each) if not place else chosen.randrange(len(each))] for place, each in enumerate(lists)
        ]
        yield (
            "equal",
            [_filled(*each, chosen) for each in zip(region.inputs, (each[None] for each in picked), strict=True)],
        )


def _results(region: Region, code: Callable[[list[Any]], Sequence[Any]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """All results of the body, those with places as they were written."""
    places = [_like(each).zero_() for each in region.places]
    results = dict(zip(region.returned, code([*inputs, *places]), strict=True))
    results |= dict(zip(region.placed, places, strict=True))
    return [results[index] for index in sorted(results)]


def _like(example: Tensor) -> Tensor:
    return torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)


def _filled(example: Tensor, numbers: Tensor, chosen: random.Random) -> Tensor:
    """A tensor of a geometry with some numbers, over and over, from a random one on."""
    made = _like(example)
    memory = made.as_strided((tensor_bytes(made) // made.dtype.itemsize,), (1,))
    begin = chosen.randrange(len(numbers))
    num_copies = math.ceil((begin + memory.numel()) / len(numbers))
    memory.copy_(numbers.repeat(num_copies)[begin : begin + memory.numel()])
    return made


@functools.cache
def _numbers(dtype: torch.dtype, kind: str) -> Tensor:
    """Random numbers of one kind, the same in each process."""
    generator = torch.Generator().manual_seed(0)
    if kind == "odd" or not dtype.is_floating_point:
        odd = _odd(dtype)
        return odd[torch.randint(len(odd), (_DRAWN,), generator=generator)]
    numbers = torch.randn(_DRAWN, generator=generator, dtype=torch.float64)
    if kind == "far":
        limits = torch.finfo(dtype)
        lowest, highest = math.log2(limits.smallest_normal) - 8, math.log2(limits.max)
        numbers *= torch.exp2(
            torch.rand(_DRAWN, generator=generator, dtype=torch.float64) * (highest - lowest) + lowest
        )
    return numbers.to(dtype)


@functools.cache
def _odd(dtype: torch.dtype) -> Tensor:
    """Numbers at which arithmetic is likely to differ."""
    if dtype is torch.bool:
        return torch.tensor([False, True])
    if not dtype.is_floating_point:
        return torch.arange(0 if dtype is torch.uint8 else -100, 100).to(dtype)
    limits = torch.finfo(dtype)
    tiny, large = limits.smallest_normal, limits.max
    ordinary = [0.0, 1.0, 0.5, 2.0, 3.0, 1 / 3, limits.eps]
    positive = torch.tensor(
        [*ordinary, tiny, tiny / 2, tiny / 4, large, large / 2, math.inf, math.nan], dtype=torch.float64
    )
    return torch.cat([positive, -positive]).to(dtype)


def _num_differing(own: Tensor, other: Tensor) -> int:
    """The number of elements with other bits; all of them where the geometries differ."""
    if (own.shape, own.stride(), own.dtype) != (other.shape, other.stride(), other.dtype):
        return own.numel()
    if not own.is_floating_point():
        return int((own != other).sum())
    are_equal = (own == other) & (own.signbit() == other.signbit())
    return int((~(are_equal | (own.isnan() & other.isnan()))).sum())
