"""The order of the collectives of each kind of call, on which all ranks agree the first time.

Ranks may meet different shapes in one step, so no rank may wait for others because a shape is new to it.

part of a call    on all ranks   may it change the collectives?        when ranks agree
mode              equal          yes                                   at the first call of the mode
flags             equal          yes: `use_head=False`, `eval()`       at the first call with these flags, if it does
shapes, the rest  may differ     no: a PlanError on the rank           never
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import Any, NamedTuple

from fxzero.comm import agree
from fxzero.comm.groups import Group
from fxzero.errors import PlanError
from fxzero.graph.verify import collectives
from fxzero.planning.plan import Plan


class Mode(NamedTuple):
    """The part of a call that its collectives follow from."""

    has_backward: bool
    trained: tuple[bool, ...]
    """Every parameter's `requires_grad`."""
    differentiated: tuple[int, ...]
    """Indices of the outputs that receive a gradient."""


@dataclass
class Orders:
    """The collectives that ranks have agreed on."""

    group: Group | None
    rank: int
    timeout: timedelta
    _first: dict[Mode, list[str]] = field(default_factory=dict[Mode, "list[str]"])
    """The collectives of the first call of each mode."""
    _of_flags: dict[tuple[Mode, Any], list[str]] = field(default_factory=dict[Any, "list[str]"])
    """The collectives of calls with each mode and flags."""

    @property
    def is_empty(self) -> bool:
        return not self._first

    def expects_agreement(self, has_backward: bool, trained: tuple[bool, ...]) -> bool:
        """True if no call like this one was made yet, so that the other ranks will wait for this one's collectives."""
        return all((mode.has_backward, mode.trained) != (has_backward, trained) for mode in self._first)

    def forget(self) -> None:
        """Start anew, as all ranks do whose plans are made again."""
        self._first.clear()
        self._of_flags.clear()

    def check(self, mode: Mode, flags: Any, order: list[str], *, agreed: bool) -> None:
        """Accept the collectives of a new plan.

        Args:
            flags: the part of the call that is equal on all ranks; hashable.
            agreed: ranks have compared this order already.

        Raises:
            PlanError: calls with these flags had other collectives: a new shape changed them.
            RankMismatchError: other ranks have other collectives.
        """
        known = self._of_flags.get((mode, flags))
        if known is None and not agreed and order != self._first.get(mode):
            agree.agree(self.group, "mode", order, timeout=self.timeout)
        elif known is not None and known != order:
            raise PlanError(f"rank {self.rank}: {_difference(known, order)}")
        first = self._first.setdefault(mode, order)
        self._of_flags.setdefault((mode, flags), first if order == first else order)  # one list for many flags


def order_of(plan: Plan) -> list[str]:
    """The collectives of a plan: those of a step that reduces gradients, then those of one under no_sync()."""
    held = plan.form(synchronize=False).step
    order = collectives(plan.step)
    return order if held is plan.step else [*order, *(f"{line} under no_sync" for line in collectives(held))]


def _difference(first: Sequence[str], order: Sequence[str]) -> str:
    pairs = zip_longest(first, order, fillvalue="nothing more")
    place, (there, here) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
    return (
        f"this call needs other collectives than the first one of its mode: number {place} is '{here}' instead of "
        f"'{there}'. Ranks that do not meet this shape would wait for other bytes. Make the model use the same "
        "parameters in the same order for every input."
    )
