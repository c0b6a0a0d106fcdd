"""Rules for the places of starts and waits and for buckets that stay gathered, shared by passes and predictions.

A pass applies a rule to the nodes of a graph. The choice of sizes from costs (`cost/choose_sizes.py`) applies it to
candidates that have no graph yet, so that it predicts the schedule that the pass will write.
"""

import math
from collections.abc import Iterator, Sequence


def gather_starts(nbytes: Sequence[int], max_inflight_bytes: int) -> list[int]:
    """For each gather of a phase, the index of an earlier gather: it starts just before the wait of that one.

    Index 0 stands for the begin of the phase. A gather starts as early as the bytes in flight allow, and at least one
    wait before its own.

    Args:
        nbytes: bytes of each gather, in the order of their first readers.
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
    """For each reduction, the indices of earlier reductions whose waits stand just before its start, to free memory.

    All other waits stand at the end of backward. One reduction may always be in flight.

    Args:
        nbytes: bytes of each reduction, in the order of their starts.
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
    """For each bucket, whether it stays gathered from forward to backward.

    The first buckets in backward are the last in forward: they are held for the shortest time, so they are kept first.

    Args:
        nbytes: bytes of each bucket, in the order of their first use in backward.
        max_kept_bytes: upper bound on the bytes of all kept buckets; None keeps all.
    """
    kept: list[bool] = []
    room = math.inf if max_kept_bytes is None else max_kept_bytes
    for size in nbytes:
        kept.append(size <= room)
        room -= size if kept[-1] else 0
    return kept
