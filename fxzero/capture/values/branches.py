"""Branches of a forward on values that follow from its inputs alone: they are decided as in eager, and guarded.

    if attention_mask.all(): attention_mask = None        a plan for masks of ones, another for all others

A value counts if integers and booleans that the call is given, and constants, make it: masks, positions, ids; floating
ones if constants alone do. How it follows from them is kept, so that each later call of this kind is asked the same
question before its plan is chosen.
"""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fxzero import torch_internals

MOST_BRANCHES = 6
"""Branches on inputs that one forward may have: each may double the number of plans."""


@dataclass(frozen=True, eq=False)
class Known:
    """How a value follows from inputs."""

    operator: Any = None
    """None for an input."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    index: int = -1
    """Index of the input."""
    has_inputs: bool = True
    """False for a constant."""


class Branch(NamedTuple):
    """A condition on inputs, and what it was in the trace."""

    condition: Known
    outcome: bool

    def holds(self, inputs: Sequence[Tensor]) -> bool:
        """True if the forward takes the same branch with these inputs."""
        return _decided(self.condition, inputs) == self.outcome


class KnownValues:
    """Follows the values of one forward.

    Args:
        stand_ins: the traced tensors of the inputs.
        inputs: their real tensors.
    """

    def __init__(self, stand_ins: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self.branches: list[Branch] = []
        self._inputs = inputs
        self._known: dict[int, tuple[weakref.ref[Tensor], Known]] = {}
        self._constants: dict[int, tuple[weakref.ref[Tensor], Known]] = {}
        """Floating ones, which a forward writes more often: then only these are forgotten."""
        for index, (stand_in, tensor) in enumerate(zip(stand_ins, inputs, strict=True)):
            if _counts(tensor) and tensor.device.type != "meta":
                self._add(stand_in, Known(index=index))

    def is_known(self, tensor: Any) -> bool:
        """True if the values of a traced tensor follow from inputs, and may decide a branch."""
        known = self._known_of(tensor)
        return known is not None and _counts(tensor) and self._may_decide(known)

    def decide(self, operator: Any, args: tuple[Any, ...]) -> bool | None:
        """What a branch reads; None for an operator that is no branch, or whose value is not known."""
        if operator is not torch.ops.aten._local_scalar_dense.default or args[0].dtype != torch.bool:
            return None
        known = self._known_of(args[0])
        if known is None or not self._may_decide(known):
            return None
        try:
            outcome = _decided(known, self._inputs)
        except RuntimeError:  # on two devices, say
            return None
        if known.has_inputs:
            self.branches.append(Branch(known, outcome))
        return outcome

    def value_of(self, tensor: Tensor) -> tuple[Tensor, bool] | None:
        """The value of a traced tensor, and whether it is a constant; None if it is not known."""
        known = self._known_of(tensor)
        if known is None:
            return None
        try:
            with torch_internals.without_dispatch(), torch.no_grad():
                return _computed(known, self._inputs, {}), not known.has_inputs
        except RuntimeError:
            return None

    def ran(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operator has run."""
        if torch_internals.is_mutable(operator):
            given = torch_internals.named_arguments(operator, args, kwargs)
            written = torch_internals.tree_leaves([given[name] for name in torch_internals.written_names(operator)])
            if any(self._known_of(each) is not None for each in written):
                self._constants.clear()  # views of it are not told apart
            if any(map(_counts, written)):
                self._known.clear()
                self._constants.clear()
        elif isinstance(result, Tensor) and not _is_random(operator):
            found = list[Known]()
            try:
                of_args, of_kwargs = self._followed(args, found), self._followed(kwargs, found)
            except LookupError:
                return
            has_inputs = any(each.has_inputs for each in found)
            if _counts(result) or not has_inputs:
                self._add(result, Known(operator, of_args, of_kwargs, has_inputs=has_inputs))

    def _followed(self, value: Any, found: list[Known]) -> Any:
        """An argument with `Known` in the place of its tensors, which `found` receives.

        Raises:
            LookupError: one is not known, or there is a symbolic number.
        """
        if isinstance(value, Tensor):
            known = self._known_of(value)
            if known is None:
                raise LookupError
            found.append(known)
            return known
        if isinstance(value, list | tuple):
            items: Any = value
            return [self._followed(each, found) for each in items]
        if isinstance(value, dict):
            entries: Any = value
            return {key: self._followed(each, found) for key, each in entries.items()}
        if torch_internals.is_symbolic(value):
            raise LookupError
        return value

    def _add(self, tensor: Tensor, known: Known) -> None:
        entries, others = (self._known, self._constants)[:: 1 if _counts(tensor) else -1]
        entries[id(tensor)] = weakref.ref(tensor), known
        others.pop(id(tensor), None)  # of one that had this address

    def _known_of(self, tensor: Any) -> Known | None:
        entry = self._known.get(id(tensor)) or self._constants.get(id(tensor))
        return None if entry is None or entry[0]() is not tensor else entry[1]

    def _may_decide(self, known: Known) -> bool:
        return not known.has_inputs or len(self.branches) < MOST_BRANCHES


def are_equal(some: Sequence[Branch], others: Sequence[Branch]) -> bool:
    """True if branches ask the same of the same inputs, in one order, and were decided alike."""
    equal = set[tuple[int, int]]()  # a value may be part of many others

    def is_same(a: Any, b: Any) -> bool:
        if type(a) is not type(b):
            return False
        if isinstance(a, Known):
            if (id(a), id(b)) not in equal:
                if (a.operator, a.index, a.has_inputs) != (b.operator, b.index, b.has_inputs):
                    return False
                if not (is_same(a.args, b.args) and is_same(a.kwargs, b.kwargs)):
                    return False
                equal.add((id(a), id(b)))
            return True
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(is_same, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(is_same(each, b[key]) for key, each in a.items())
        return bool(a == b)

    return is_same(list(some), list(others))


def _decided(condition: Known, inputs: Sequence[Tensor]) -> bool:
    with torch_internals.without_dispatch():
        return bool(_computed(condition, inputs, {}).item())


def _computed(value: Any, inputs: Sequence[Tensor], results: dict[int, Any]) -> Any:
    if isinstance(value, Known):
        if value.operator is None:
            return inputs[value.index]
        if id(value) not in results:
            args: Any = _computed(value.args, inputs, results)
            results[id(value)] = value.operator(*args, **_computed(value.kwargs, inputs, results))
        return results[id(value)]
    if isinstance(value, list | tuple):
        items: Any = value
        return [_computed(each, inputs, results) for each in items]
    if isinstance(value, dict):
        entries: Any = value
        return {key: _computed(each, inputs, results) for key, each in entries.items()}
    return value


def _counts(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


@functools.cache
def _is_random(operator: Any) -> bool:
    """True also for memory that holds anything."""
    return torch.Tag.nondeterministic_seeded in operator.tags or "empty" in operator.name()
