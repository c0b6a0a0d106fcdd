"""The collectives of each mode of calls: every plan of a mode has one list of them, on which all ranks agree.

Ranks may meet different shapes, arguments and losses in one step, so no rank may wait for others because a call is new
to it: the plan of a call that needs less makes the whole list, with nothing in the place of what it does not need.

a call needs            what happens
in a new mode           ranks exchange what their calls need; the list is all of it
no more than the list   its plan is completed to the list; nobody is asked
more than the list      ranks that need more meet and extend the list; where others do not come, a PlanError
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import Any, NamedTuple

from fxzero.comm import agree
from fxzero.comm.groups import Group
from fxzero.errors import PlanError, RankMismatchError
from fxzero.graph.needs import cannot_follow, merge_needs
from fxzero.graph.recipe import Need, Needs
from fxzero.graph.verify import collectives
from fxzero.planning.plan import Plan

HEADS = "heads"
"""What a rank posts, in an agreement on a mode, that begins a backward."""


class Mode(NamedTuple):
    """The part of a call that its collectives follow from."""

    has_backward: bool
    trained: tuple[bool, ...]
    """Every parameter's `requires_grad`."""
    called: str = ""
    """The name of the method; empty for the model itself."""


@dataclass
class Orders:
    """The collectives that ranks have agreed on."""

    group: Group | None
    rank: int
    timeout: timedelta
    _needs: dict[Mode, Needs] = field(default_factory=dict[Mode, Needs])
    """What the calls of each mode need, on all ranks together."""
    _orders: dict[tuple[Mode, Needs], list[str]] = field(default_factory=dict[Any, "list[str]"])
    """The collectives of the plans that were made from each list."""
    _meeting: set[Mode] = field(default_factory=set[Mode])
    """Modes at whose next plan all ranks agree again."""

    @property
    def is_empty(self) -> bool:
        return not self._orders

    def knows(self, mode: Mode) -> bool:
        """False if the other ranks will wait for this one, to agree on the collectives of the mode."""
        return any(known == mode for known, _ in self._orders)

    def has(self, mode: Mode, needs: Needs, order: list[str]) -> bool:
        """True if ranks have agreed on the collectives of a plan of the mode, and none waits to agree again."""
        known = self._needs.get(mode, ())
        is_agreed = mode in self._needs and mode not in self._meeting and cannot_follow(needs, known) is None
        return is_agreed and self._orders.get((mode, known)) == order

    def forget_orders(self) -> None:
        """Start anew, as all ranks do whose plans are made again; what calls need stays."""
        self._orders.clear()

    def meet(self, mode: Mode, *, anew: bool) -> None:
        """Let ranks agree again at the next plan of a mode, which all of them make together.

        Args:
            anew: forget what the calls of the mode needed.
        """
        if anew:
            self._needs.pop(mode, None)
        self._orders = {key: order for key, order in self._orders.items() if key[0] != mode}
        self._meeting.add(mode)

    def settle(self, mode: Mode, needs: Needs, topic: str) -> tuple[Needs, bool]:
        """What all ranks need together in a mode, given what a new call on this rank needs.

        Returns:
            The list, and whether the lists of the mode have grown, so that older plans may have too few collectives.

        Raises:
            PlanError: the call needs more than was agreed on, and other ranks do not.
            RankMismatchError: a rank reported a failure, or is elsewhere.
        """
        known, all_come = self._needs.get(mode, ()), mode not in self._needs or mode in self._meeting
        missing = cannot_follow(needs, known)
        if missing is None and not all_come:
            return known, False
        alone = None if all_come else self._refusal(missing)
        posts = agree.exchange(self.group, topic, _lines(mode, needs), timeout=self.timeout, alone=alone)
        self._meeting.discard(mode)
        _check_kinds(posts)
        of_ranks = _needs_in(posts, mode)
        self._needs[mode] = merge_needs([known, *of_ranks]) if of_ranks else needs
        return self._needs[mode], not all_come

    def _refusal(self, missing: Need | None) -> str:
        return (
            f"rank {self.rank}: this call needs other collectives than the first one of its mode: the {missing} is not "
            "among those that ranks agreed on, or has another place, and not all ranks need it now. Pass an example= "
            "that reaches every parameter to fxzero.compile, or let the first call of some rank reach it; and use "
            "parameters in one order."
        )

    def check(self, mode: Mode, needs: Needs, order: list[str], *, agreed: bool) -> None:
        """Accept the collectives of a new plan.

        Args:
            needs: the list that it was made from; empty where the order is not completed to one.
            agreed: ranks have compared this order already.

        Raises:
            PlanError: the first plan from this list had other collectives.
            RankMismatchError: other ranks have other collectives.
        """
        known = self._orders.get((mode, needs))
        if known is not None and known != order and needs:
            raise PlanError(f"rank {self.rank}: {_difference(known, order)}")
        if known != order and not agreed:
            agree.agree(self.group, "mode", order, timeout=self.timeout)
        self._orders[mode, needs] = order


def _check_kinds(posts: Sequence[Sequence[str]]) -> None:
    """Refuse to compare what a call needs with what a backward differentiates (`heads.py`)."""
    backwards = [index for index, post in enumerate(posts) if post[0] == HEADS]
    if backwards:
        raise RankMismatchError(
            f"Rank {backwards[0]} of the group begins a backward that differentiates other outputs than before, where "
            "others begin a call that needs other parameters. Run the same steps on every rank."
        )


def _lines(mode: Mode, needs: Needs) -> list[str]:
    return [repr(mode), *(json.dumps(need) for need in needs)]


def _needs_in(posts: Sequence[Sequence[str]], mode: Mode) -> list[Needs]:
    """What the ranks posted that are in a mode."""
    return [tuple(Need(*json.loads(line)) for line in lines) for kind, *lines in posts if kind == repr(mode)]


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
