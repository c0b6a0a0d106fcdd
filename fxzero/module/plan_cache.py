"""The plans of a model: one per kind of call and per set of outputs that were differentiated, the latest used ones."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass, field

from fxzero.module.call_kind import Pattern, Signature
from fxzero.runtime.executable import BoundPlan

MAX_PLANS = 64
"""Plans kept; the least recently used is dropped beyond."""
MANY_SHAPES = 9
"""The number of different shapes at which a warning advises padding."""


@dataclass
class PlanCache:
    """See the module docstring."""

    _plans: OrderedDict[tuple[Signature, Pattern], BoundPlan] = field(
        default_factory=OrderedDict[tuple[Signature, Pattern], BoundPlan]
    )
    _patterns: dict[Signature, Pattern] = field(default_factory=dict[Signature, Pattern])
    """For which pattern a kind of call was differentiated last: its next forward runs that plan."""
    _warned: bool = False

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, signature: Signature, pattern: Pattern) -> BoundPlan | None:
        """One plan, if it is there."""
        return self._plans.get((signature, pattern))

    def pattern_of(self, signature: Signature) -> Pattern | None:
        """For which pattern a kind of call was differentiated last; None for a new kind."""
        return self._patterns.get(signature)

    def find(self, signature: Signature) -> BoundPlan | None:
        """The plan that the next forward of a kind of call runs."""
        pattern = self._patterns.get(signature)
        bound = None if pattern is None else self.get(signature, pattern)
        if bound is not None and pattern is not None:
            self._plans.move_to_end((signature, pattern))
        return bound

    def prefer(self, signature: Signature, pattern: Pattern) -> None:
        """Run the plan of this pattern at the next forward of a kind of call."""
        self._patterns[signature] = pattern

    def clear(self) -> None:
        """Drop all plans; kinds of calls keep their patterns."""
        self._plans.clear()

    def keep(self, signature: Signature, pattern: Pattern, bound: BoundPlan) -> None:
        """Add a plan; if there are too many then, drop the one that was not used for the longest time."""
        self._plans[signature, pattern] = bound
        self._patterns.setdefault(signature, pattern)
        self._warn_of_many_shapes(signature)
        while len(self._plans) > MAX_PLANS:
            (oldest, pattern), _ = self._plans.popitem(last=False)
            if self._patterns.get(oldest) == pattern:
                del self._patterns[oldest]

    def _warn_of_many_shapes(self, signature: Signature) -> None:
        shapes = dict.fromkeys(
            tuple(tuple(leaf.shape) for leaf in key.tensor_leaves)
            for key, _ in self._plans
            if key.grad == signature.grad
        )
        if len(shapes) >= MANY_SHAPES and not self._warned:
            self._warned = True
            listed = ", ".join(str(shape) for shape in shapes)
            warnings.warn(
                f"{len(shapes)} different input shapes so far, each traced and planned for itself: {listed}. Pad the "
                "inputs to a multiple (of 64 tokens, say) so that few shapes remain.",
                stacklevel=9,
            )
