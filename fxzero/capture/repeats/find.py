"""Finds the blocks of a model, and runs of equal ones in what a forward recorded."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fxzero.capture.repeats.record import Place, Segment

_LONGEST_PERIOD = 8
_FEWEST_BLOCKS = 6
"""Siblings of one class that are worth it."""
_FEWEST_SKIPPED = 2


@dataclass(frozen=True)
class Run:
    """Equal blocks one after another; where the period is above 1, equal groups of so many blocks.

    Traced are the first group, of which the others are copies, and those at the end.
    """

    first: int
    """The index of the first segment."""
    period: int
    num_groups: int
    num_last: int
    """Groups at the end that are traced."""

    @property
    def skipped(self) -> range:
        """The indices of the segments that are not traced."""
        return range(self.first + self.period, self.after_gap)

    @property
    def after_gap(self) -> int:
        """The index of the first segment that is traced behind those that are not."""
        return self.first + (self.num_groups - self.num_last) * self.period

    @property
    def end(self) -> int:
        """The index behind the last segment."""
        return self.first + self.num_groups * self.period


def blocks_of(model: nn.Module) -> dict[int, str]:
    """The paths of the modules of which there are many of one class in one place, by the ids of the modules."""
    found: dict[int, str] = {}
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        prefix, parent = pending.pop()
        children = [(f"{prefix}{name}", child) for name, child in parent.named_children()]
        kinds = Counter(type(child) for _, child in children)
        is_list = isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        has_many = any(number >= _FEWEST_BLOCKS for number in kinds.values())
        for path, child in children:
            if kinds[type(child)] >= _FEWEST_BLOCKS or (is_list and has_many):
                found[id(child)] = path
            else:
                pending.append((f"{path}.", child))
    return found


def relative(place: Place, index: int, period: int, segments: Sequence[Segment]) -> Place:
    """A place as seen from a segment: one in it, or in a block at most `period` before it, by the distance."""
    made_in = place[0]
    if isinstance(made_in, int) and index - made_in <= period and segments[made_in].path is not None:
        return "back", index - made_in, *place[1:]
    return place


def runs_of(segments: Sequence[Segment]) -> list[Run]:
    """The longest runs of equal blocks, in order."""
    numbers: dict[object, int] = {}
    alike = [numbers.setdefault((_parent(each.path), tuple(each.operators)), len(numbers)) for each in segments]
    runs: list[Run] = []
    index = 0
    while index < len(segments):
        run = next((r for p in range(1, _LONGEST_PERIOD + 1) if (r := _run_at(index, p, alike, segments))), None)
        if run is not None:
            runs.append(run)
        index = index + 1 if run is None else run.end
    return runs


def _run_at(index: int, period: int, alike: Sequence[int], segments: Sequence[Segment]) -> Run | None:
    end = index
    while end + period < len(segments) and _are_equal(end, end + period, period, alike, segments):
        end += 1
    num_groups = (end - index + period) // period
    if end == index or num_groups < 3:
        return None
    members = segments[index : index + num_groups * period]
    num_last = 3 if any(each.shares_grad for each in members) else 2
    run = Run(index, period, num_groups, num_last)
    return run if len(run.skipped) >= _FEWEST_SKIPPED else None


def _are_equal(a: int, b: int, period: int, alike: Sequence[int], segments: Sequence[Segment]) -> bool:
    if segments[a].path is None or alike[a] != alike[b]:
        return False
    places = zip(segments[a].reads, segments[b].reads, strict=True)
    return all(relative(x, a, period, segments) == relative(y, b, period, segments) for x, y in places)


def _parent(path: str | None) -> str | None:
    return None if path is None else path.rpartition(".")[0]
