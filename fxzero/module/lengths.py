"""Predicts plans of calls that differ from earlier ones in one length alone: a fourth length needs no trace.

a new length           what happens
the first three        traced and planned; at the third, their graphs make a family if they differ in integers alone
any other              a rehearsal of the forward shows that it fits the family; its plan is then a matter of arithmetic
one that does not fit  traced and planned; with two others like it, it makes a family of its own
"""

import dataclasses
import gc
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fxzero.capture.call import flatten_call
from fxzero.capture.numbers import StandIns
from fxzero.graph.layout import ParamSpec
from fxzero.graph.recipe import Needs
from fxzero.module.call_kind import Arguments, Pattern, Signature
from fxzero.module.changing_numbers import ChangingNumbers
from fxzero.module.sharded_model import ShardedModel
from fxzero.planning.lengths.family import Family, TracedCall, kind_of
from fxzero.planning.lengths.record import ForwardRecord
from fxzero.planning.lengths.rehearsal import Rehearsal
from fxzero.runtime.executable import BoundPlan

logger = logging.getLogger(__name__)

MAX_KINDS = 8
"""Kinds of calls, lengths aside, that are kept track of."""
MAX_CALLS = 4
"""Traced calls of one kind that wait for others like them."""
MAX_FAMILIES = 4
"""Families of one kind; a model that branches on a length has one on each side."""
MAX_REHEARSALS = 2
"""Families that are tried for one call."""


@dataclass(frozen=True)
class _Traced:
    """A traced call and what it was bound to."""

    call: TracedCall
    bound: BoundPlan
    needs: Needs
    order: list[str]


@dataclass(frozen=True)
class Predicted:
    """The plan of a length that was not traced."""

    bound: BoundPlan
    lengths: tuple[int, int, int]
    """The lengths that it was predicted from."""


@dataclass
class _Kind:
    """Calls that are equal but for lengths."""

    calls: list[_Traced] = field(default_factory=list[_Traced])
    families: list[tuple[Family, _Traced]] = field(default_factory=list[tuple[Family, _Traced]])
    """The last used first."""


@dataclass
class Lengths:
    """The lengths of one model's calls."""

    sharded: ShardedModel
    _kinds: OrderedDict[Any, _Kind] = field(default_factory=OrderedDict[Any, _Kind])

    def forget(self) -> None:
        """Start anew: plans are made by another recipe from now on."""
        self._kinds.clear()

    def note(
        self,
        signature: Signature,
        pattern: Pattern | None,
        record: ForwardRecord | None,
        bound: BoundPlan,
        needs: Needs,
        order: list[str],
    ) -> None:
        """Take in a call that was traced and planned.

        Args:
            record: what its forward ran; None where no record can hold that.
            needs, order: its collectives.
        """
        if record is None or not self._can_predict():
            return
        kind = self._kinds.setdefault(_key(signature, pattern), _Kind())
        self._kinds.move_to_end(_key(signature, pattern))
        while len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        new = _Traced(TracedCall(signature.call, bound.plan, record), bound, needs, order)
        for others in itertools.combinations(reversed(kind.calls), 2):
            family = Family.of([each.call for each in (*others, new)])
            if isinstance(family, Family):
                last = next(each for each in (*others, new) if each.call is family.last)
                kind.families.insert(0, (family, last))
                del kind.families[MAX_FAMILIES:]
                kind.calls = [each for each in kind.calls if each not in others]
                gc.collect()  # what three traces made is old now: a full collection would come in a step soon
                logger.info("lengths %s make a family: other lengths need no trace", family.lengths)
                return
            logger.debug("no family: %s", family)
        kind.calls.append(new)
        del kind.calls[:-MAX_CALLS]

    def predict(
        self,
        signature: Signature,
        pattern: Pattern | None,
        arguments: Arguments,
        params: dict[str, ParamSpec],
        accepts: Callable[[BoundPlan, Needs, list[str]], bool],
    ) -> Predicted | None:
        """The plan of a call that fits a family; None if there is none, or if the forward does something else.

        Args:
            params: every parameter, as for a trace.
            accepts: tells whether ranks have agreed on the collectives of a plan, and none waits for others.
        """
        kind = self._kinds.get(_key(signature, pattern))
        if kind is None or not kind.families or not self._can_predict():
            return None
        left = MAX_REHEARSALS
        for family, last in list(kind.families):
            values, plan = family.values_for(signature.call), last.bound.plan
            if values is None or not left or not plan.captured.state.holds():
                continue
            if not accepts(last.bound, last.needs, last.order):
                continue
            left -= 1
            inputs, spec = flatten_call(*arguments)
            state = plan.captured.state
            stand_ins = StandIns(state.numbers.slots) if state.numbers.slots else None
            rehearsal = Rehearsal(
                self.sharded.model, self.sharded.forward, *arguments, inputs, spec, params,
                self.sharded.devices.compute, plan.captured.step.has_backward, None, stand_ins,
            )  # fmt: skip
            if rehearsal.matches(family.expected(values)):
                kind.families.remove((family, last))
                kind.families.insert(0, (family, last))
                made = family.plan_at(values, self.sharded.comm.backend, self.sharded.arena.nbytes)
                state = dataclasses.replace(state, numbers=state.numbers.under(rehearsal.conditions))
                captured = dataclasses.replace(plan.captured, state=state, branches=tuple(rehearsal.branches))
                made = dataclasses.replace(made, captured=captured)
                return Predicted(last.bound.at_length(made, family.tangents(values)), family.lengths)
        return None

    def note_changes(self, signature: Signature, pattern: Pattern | None, numbers: ChangingNumbers) -> None:
        """Note in what the Python state differs from that of the last call that was equal but for lengths."""
        kind = self._kinds.get(_key(signature, pattern))
        if kind is not None:
            last = kind.calls[-1] if kind.calls else kind.families[0][1]
            if last.call.spec != signature.call:  # else its own plan tells
                numbers.note(last.bound.plan.captured.state)

    def _can_predict(self) -> bool:
        """False where somebody looks at each pass, gives passes of their own, or fuses or chunks for each length."""
        recipe = self.sharded.recipe
        looks_on = os.environ.get("FXZERO_CHECK") or os.environ.get("FXZERO_DUMP")
        return not looks_on and self.sharded.passes is None and recipe.compute == "eager" and recipe.loss_chunks == 1


def _key(signature: Signature, pattern: Pattern | None) -> Any:
    """What calls have in common that may differ in lengths alone."""
    return dataclasses.replace(signature, call=kind_of(signature.call)), pattern
