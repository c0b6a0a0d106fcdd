"""The order of the collectives of each kind of call, which all ranks agree on the first time.

Ranks may meet different shapes in one step, so no rank may wait for others because a shape is new to it. What a call
has in common on all ranks is its mode; whatever else it has may change nothing about its collectives, with one
exception: flags, which the same script sets on every rank (`use_head=False`, `model.eval()`), may lead to other
collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from fxzero.comm import agree
from fxzero.comm.groups import Group
from fxzero.errors import PlanError
from fxzero.graph.verify import collectives
from fxzero.planning.plan import Plan


@dataclass(frozen=True)
class Mode:
    """What decides about collectives."""

    has_backward: bool
    trained: tuple[bool, ...]
    """Every parameter's `requires_grad`."""
    differentiated: tuple[int, ...]
    """Which outputs receive a gradient."""


@dataclass
class Orders:
    """The collectives that ranks agreed on."""

    group: Group | None
    rank: int
    timeout: timedelta
    _first: dict[Mode, list[str]] = field(default_factory=dict[Mode, "list[str]"])
    _of_flags: dict[tuple[Mode, Any], list[str]] = field(default_factory=dict[Any, "list[str]"])

    @property
    def is_empty(self) -> bool:
        return not self._first

    def expects_agreement(self, has_backward: bool, trained: tuple[bool, ...]) -> bool:
        """True if no call of this kind was made, so that the others will be waiting for what this rank has."""
        return all((mode.has_backward, mode.trained) != (has_backward, trained) for mode in self._first)

    def check(self, mode: Mode, flags: Any, order: list[str], *, agreed: bool) -> None:
        """Accept the collectives of a new plan.

        Args:
            flags: whatever of the call is the same on all ranks; hashable.
            agreed: ranks have compared this order already.

        Raises:
            PlanError: calls with these flags had others: a new shape changed them.
            RankMismatchError: other ranks have others.
        """
        known = self._of_flags.get((mode, flags))
        if known is None and not agreed and order != self._first.get(mode):
            agree.agree(self.group, "mode", order, timeout=self.timeout)
        elif known is not None and known != order:
            raise PlanError(f"rank {self.rank}: {_difference(known, order)}")
        self._first.setdefault(mode, order)
        self._of_flags.setdefault((mode, flags), order)


def order_of(plan: Plan) -> list[str]:
    """The collectives of a plan: those of a step that reduces gradients, then those of one under no_sync()."""
    held = plan.form(synchronize=False).step
    order = collectives(plan.step)
    return order if held is plan.step else [*order, *(f"{line} under no_sync" for line in collectives(held))]


def _difference(first: Sequence[str], order: Sequence[str]) -> str:
    common = min(len(first), len(order))
    place = next((i for i in range(common) if first[i] != order[i]), common)
    there = first[place] if place < len(first) else "nothing more"
    here = order[place] if place < len(order) else "nothing more"
    return (
        f"this call needs other collectives than the first one of its mode: number {place} is '{here}' instead of "
        f"'{there}'. Ranks that do not meet this shape would wait for other bytes. Make the model use the same "
        "parameters in the same order for every input."
    )
