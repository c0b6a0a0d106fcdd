"""The plans of a model that were used last: one for each kind of call and pattern of outputs with a gradient."""

import logging
import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence

from torch import Tensor

from fxzero.module.call_kind import Pattern, Signature
from fxzero.module.changing_numbers import ChangingNumbers
from fxzero.runtime.executable import BoundPlan

logger = logging.getLogger(__name__)

MAX_PLANS = 64
"""Plans kept; the least recently used is dropped beyond."""
MAX_ALIKE = 8
"""Plans kept for one kind of call, which differ in the Python state that they were traced for."""
MANY_SHAPES = 9
"""The number of different shapes at which a warning advises padding."""


class PlanCache:
    """Holds at most MAX_PLANS plans, and the pattern that the next forward of each kind of call assumes."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[Signature, Pattern | None], list[BoundPlan]] = OrderedDict()
        """Plans that differ in the Python state that they were traced for, the last used one first."""
        self._patterns: dict[Signature, Pattern] = {}
        self._preferred: dict[tuple[str, tuple[bool, ...]], Pattern] = {}
        """The pattern that was preferred last of each method, with each `requires_grad` of all parameters."""
        self._warned = False
        self._changes: Counter[str] = Counter()
        """How often each slot of the Python state has changed."""

    def __len__(self) -> int:
        return sum(map(len, self._plans.values()))

    def pattern_of(self, signature: Signature) -> Pattern | None:
        """The pattern that the next forward of a kind of call assumes; a new kind assumes what others did last."""
        known = self._patterns.get(signature)
        return self._preferred.get((signature.called, signature.trained)) if known is None else known

    def prefer(self, signature: Signature, pattern: Pattern) -> None:
        """Let the next forward of a kind of call assume a pattern."""
        self._patterns[signature] = self._preferred[signature.called, signature.trained] = pattern

    def find(self, signature: Signature, pattern: Pattern | None, inputs: Sequence[Tensor]) -> BoundPlan | None:
        """The plan that fits a call and the Python state, which becomes the last used one; or None."""
        alike = self._plans.get((signature, pattern), ())
        for index, bound in enumerate(alike):
            if bound.plan.captured.fits(inputs):
                self._plans.move_to_end((signature, pattern))
                if index:
                    alike.insert(0, alike.pop(index))  # type: ignore[union-attr]
                return bound
        return None

    def note_changes(self, signature: Signature, pattern: Pattern | None, numbers: ChangingNumbers) -> None:
        """Note in what the Python state differs from that of the plan for this kind of call that was used last."""
        alike = self._plans.get((signature, pattern))
        if alike:
            state = alike[0].plan.captured.state
            numbers.note(state)
            changed = state.changed()
            changed_names = ", ".join(changed[:5]) or "the values of an input, of which forward branches"
            logger.info("traced anew, since it changed: %s", changed_names)
            self._warn_of_changes({*changed}.difference(each.label for each in state.candidates))

    def _warn_of_changes(self, labels: set[str]) -> None:
        """Warn once of state, other than numbers, that keeps changing."""
        self._changes.update(labels)
        often = [label for label in sorted(labels) if self._changes[label] == MAX_ALIKE]
        if often:
            warnings.warn(
                f"{often[0]} has changed {MAX_ALIKE} times between calls, and forward reads it: each time the call is "
                "traced and planned anew, which takes as long as the first call. Keep what grows outside of the model "
                "(return it from forward), or make it a tensor.",
                stacklevel=10,
            )

    def clear(self) -> None:
        """Drop all plans; kinds of calls keep their patterns."""
        self._plans.clear()

    def keep(self, signature: Signature, pattern: Pattern, bound: BoundPlan) -> None:
        """Add a plan, and drop the least recently used one if there are too many."""
        alike = self._plans.setdefault((signature, pattern), [])
        alike.insert(0, bound)
        del alike[MAX_ALIKE:]
        self._patterns.setdefault(signature, pattern)
        self._warn_of_many_shapes(signature)
        while len(self) > MAX_PLANS:
            (oldest, its_pattern), _ = self._plans.popitem(last=False)
            if self._patterns.get(oldest) == its_pattern:
                del self._patterns[oldest]

    def _warn_of_many_shapes(self, signature: Signature) -> None:
        traced = [key for (key, _), plans in self._plans.items() if not all(each.plan.is_predicted for each in plans)]
        alike = [key for key in traced if key.grad == signature.grad]
        shapes = dict.fromkeys(tuple(tuple(leaf.shape) for leaf in key.tensor_leaves) for key in alike)
        if len(shapes) >= MANY_SHAPES and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(shapes)} different input shapes so far, each traced and planned for itself: "
                f"{', '.join(map(str, shapes))}. Pad the inputs to a multiple (of 64 tokens, say) so that few shapes "
                "remain.",
                stacklevel=10,
            )
