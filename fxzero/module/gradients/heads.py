"""The outputs of a model that receive gradients, on all ranks: those for which forward saves values.

a backward                                what happens
the first of a mode                       ranks exchange which outputs they differentiate; forward saves for all of them
of some outputs that forward saved for    runs narrowed: nobody is asked
of others                                 ranks that differentiate others meet; where some do not come, a PlanError

Where forward had saved for fewer on some rank, all ranks run it again, so that none gathers alone.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from fxzero.comm import agree
from fxzero.comm.groups import Group
from fxzero.errors import RankMismatchError
from fxzero.module.call_kind import Pattern, Signature
from fxzero.module.ranks.collective_orders import HEADS
from fxzero.runtime.executable import Executable


@dataclass
class Heads:
    """Decides for which outputs forward saves values, the same on all ranks."""

    group: Group | None
    rank: int
    timeout: timedelta
    is_alone: bool
    """True if there is no other rank."""
    _settled: set[tuple[str, tuple[bool, ...]]] = field(default_factory=set["tuple[str, tuple[bool, ...]]"])
    """The modes (a method, every parameter's `requires_grad`) whose first backward was begun."""

    def settle(
        self, signature: Signature, executable: Executable, pattern: Pattern, meet: Callable[..., None]
    ) -> tuple[Pattern, bool]:
        """For which outputs forward must have saved values, given the outputs that receive a gradient.

        Args:
            executable: what ran forward.
            meet: called where all ranks make plans again, so that they agree on what these need.

        Returns:
            The outputs, and whether forward must run again for them.
        """
        assumed = executable.plan.captured.differentiated
        if self.is_alone:
            runs_once = executable.has_islands and set(pattern) <= set(assumed)
            return (assumed, False) if runs_once else (pattern, pattern != assumed)
        mode = signature.called, signature.trained
        is_first = mode not in self._settled
        executable.is_settled = True
        if not is_first and set(pattern) <= set(assumed):
            return assumed, False
        outputs = sorted(executable.differentiable)
        lines = [HEADS, json.dumps([outputs, assumed, pattern])]
        alone = None if is_first else self._refusal(pattern, assumed)
        posts = agree.exchange(self.group, "mode", lines, timeout=self.timeout, alone=alone)
        _check_kinds(posts)
        self._settled.add(mode)
        of_ranks = [json.loads(line) for _, line in posts]
        wanted, again = _together(of_ranks, [outputs, [*assumed], [*pattern]], keeps=not is_first)
        if again:
            meet(signature, anew=is_first)
        return wanted, again

    def _refusal(self, pattern: Pattern, assumed: Pattern) -> str:
        return (
            f"rank {self.rank}: this backward differentiates outputs {list(pattern)} of the model (numbered flat); "
            f"forward has saved values for {list(assumed)} alone, which is what ranks agreed on, and not all ranks "
            "differentiate others now. A forward cannot run again on some ranks only. Let ranks differ in the first "
            "backward already, or let that differentiate all outputs that a later one may."
        )


def _together(of_ranks: list[Any], own: list[list[int]], *, keeps: bool) -> tuple[Pattern, bool]:
    """For which outputs this rank's forward saves values, and whether forward runs again, which is alike on all ranks.

    Ranks that differentiate different outputs may do so in turn: their forwards save for all outputs. Outputs of ranks
    whose calls return different ones cannot be compared.

    Args:
        of_ranks: of each rank its differentiable outputs, those that it assumed, and those that receive a gradient.
        own: those of this rank.
        keeps: save for what was assumed as well.
    """
    comparable = all(outputs == own[0] for outputs, _, _ in of_ranks)
    everyone = {index for _, _, pattern in of_ranks for index in pattern}
    differ = any(pattern != own[2] for _, _, pattern in of_ranks)

    def wanted(rank: list[list[int]]) -> list[int]:
        outputs, assumed, pattern = rank
        chosen = {*pattern, *everyone} if comparable else set(pattern)
        return outputs if comparable and differ else sorted(chosen.union(assumed if keeps else ()))

    return tuple(wanted(own)), any(wanted(rank) != rank[1] for rank in of_ranks)


def _check_kinds(posts: list[list[str]]) -> None:
    others = [index for index, post in enumerate(posts) if post[0] != HEADS]
    if others:
        raise RankMismatchError(
            f"Rank {others[0]} of the group begins a call that needs other parameters than before, where others begin "
            "a backward that differentiates other outputs. Run the same steps on every rank."
        )
