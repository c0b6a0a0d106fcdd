"""Where collectives start and are waited for, and what stays gathered: each rule once, for passes and for predictions.

A pass applies a rule to the nodes of a graph. The choice of sizes from costs applies it to candidates that have no
graph yet (`cost/choose_sizes.py`), so that what is predicted is what the pass will write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def gather_starts(nbytes: Sequence[int], max_inflight_bytes: int) -> list[int]:
    """For each gather of a phase, the gather just before whose wait it starts; 0 stands for the begin of the phase.

    A gather starts as early as the bytes in flight allow, and at least one wait before its own.

    Args:
        nbytes: of each gather, in the order of their first readers.
        max_inflight_bytes: upper bound on the bytes gathered but not yet waited for, with more than two in flight.
    """
    starts: list[int] = []
    first = flying = 0
    for index, size in enumerate(nbytes):
        flying += size
        while first < index - 1 and flying > max_inflight_bytes:
            flying -= nbytes[first]
            first += 1
        starts.append(first)
    return starts


def reductions_finished(nbytes: Sequence[int], max_inflight_bytes: int) -> Iterator[range]:
    """For each reduction, the earlier ones that are waited for just before it starts, to have their memory back.

    The others are waited for at the end of backward. One reduction may always be in flight.

    Args:
        nbytes: of each reduction, in the order of their starts.
        max_inflight_bytes: upper bound on the bytes of gradient buckets in flight.
    """
    first = flying = 0
    for index, size in enumerate(nbytes):
        flying += size
        begin = first
        while first < index and flying > max_inflight_bytes:
            flying -= nbytes[first]
            first += 1
        yield range(begin, first)


def kept_from_forward(nbytes: Sequence[int], max_kept_bytes: int | None) -> list[bool]:
    """Which of the buckets that forward gathered stay until backward, given in the order of their use in backward.

    A bucket that forward uses last and backward first is held for the shortest time, so it adds the least to what is
    live.

    Args:
        max_kept_bytes: upper bound on their bytes; None keeps all.
    """
    kept: list[bool] = []
    room = max_kept_bytes
    for size in nbytes:
        fits = room is None or size <= room
        kept.append(fits)
        if fits and room is not None:
            room -= size
    return kept
