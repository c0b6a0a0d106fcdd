"""Gathers that start before their forward: right after the optimizer made their shards new.

    optimizer.step()  | start 0 | start 1 |   ...the user's code...   | forward: wait 0 | compute | wait 1 | ...

They are those that the forward starts before all else, in its order, and they write where it expects them: nothing else
uses the arena until then. All ranks start the same ones, so all ranks must use or drop the same ones:

- the same plan runs next: it skips the starts and waits as ever;
- another plan runs next (an evaluation, or a shape that only this rank meets): what has come is copied aside before the
  plan uses the memory, and into its place at that plan's wait;
- a parameter of the bucket was changed in place meanwhile: what comes is dropped, and gathered again. Like autograd,
  this does not notice a write through `param.data`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from fxzero import compat
from fxzero.memory import Arena

Fqns = tuple[str, ...]
Stamp = list[tuple[int, int]]


class Gather(NamedTuple):
    """A gather of one plan."""

    fqns: Fqns
    start: Callable[[], object]
    wait: Callable[[], object]
    full: torch.Tensor
    """Where the bucket lies after the wait: flat, `[bucket.numel]`."""


class Plan(Protocol):
    """A plan that is bound to memory."""

    gathered_by_forward: frozenset[Fqns]

    @property
    def head(self) -> Sequence[Gather]:
        """The gathers that its forward starts before all else, in order."""
        ...

    @property
    def record_begin(self) -> Callable[[], object] | None:
        """What its forward calls first of all."""
        ...


def _none() -> None:
    """A reference to no plan."""


class EarlyGathers:
    """What is in flight for the next forward.

    Args:
        params: by name; their versions tell whether a shard changed.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], arena: Arena) -> None:
        self._params, self._arena = params, arena
        self._ids = {fqn: id(param) for fqn, param in params.items()}
        self._first: Callable[[], Plan | None] = _none  # weak: its forward holds this
        """The plan of the first forward since an optimizer stepped: taken for that of the next such forward."""
        self._looks_for_first = True
        self._waiting: deque[Gather] | None = None
        """What is to be started, in order; None while no optimizer's step is due."""
        self._owed: set[int] = set()
        """The ids of parameters that have gradients, and that no optimizer has stepped since."""
        self._is_new_round = False
        self._owner: Callable[[], Plan | None] = _none
        self._flying: list[tuple[Gather, Stamp]] = []
        """Each with what its parameters were."""
        self._taken: dict[Fqns, torch.Tensor | None] = {}
        """What the forward that runs finds started: in its place, or as a copy of what came."""

    @property
    def are_due(self) -> bool:
        """True from a backward to the next forward."""
        return self._waiting is not None

    def after_backward(self, reached: Iterable[str]) -> None:
        """Expect steps of optimizers.

        Args:
            reached: the parameters that got gradients.
        """
        if self._is_new_round:
            self._owed.clear()
            self._is_new_round = False
        self._owed.update([self._ids[fqn] for fqn in reached])
        first = self._first()
        self._waiting = deque(first.head if first is not None else ())

    def after_step(self, stepped: Iterable[int], *, is_arena_free: bool) -> None:
        """Start what can be started.

        Args:
            stepped: the ids of the parameters of the optimizer that stepped.
            is_arena_free: False while reductions are in flight.
        """
        self._owed.difference_update(stepped)
        self._is_new_round = self._looks_for_first = True
        while self._waiting and is_arena_free and self._owed.isdisjoint(self._ids_of(self._waiting[0].fqns)):
            gather = self._waiting.popleft()
            if not self._flying:
                self._begin()
            gather.start()
            self._flying.append((gather, self._stamp(gather.fqns)))

    def _begin(self) -> None:
        self._owner = self._first
        self._arena.generation += 1
        plan = self._owner()
        if plan is not None and plan.record_begin is not None:
            plan.record_begin()

    def hand_over(self, plan: Plan) -> bool:
        """Before the forward of a plan, and before it makes the arena larger: True if it finds gathers started."""
        if self._looks_for_first:
            self._first, self._looks_for_first = weakref.ref(plan), False
        self._waiting = None
        if not self._flying:
            return False
        flying, self._flying = self._flying, []
        are_new = [stamp == self._stamp(gather.fqns) for gather, stamp in flying]
        if self._owner() is plan and all(are_new):
            self._taken.update({gather.fqns: None for gather, _ in flying})
        else:
            for (gather, _), is_new in zip(flying, are_new, strict=True):
                gather.wait()
                if is_new and gather.fqns in plan.gathered_by_forward:
                    self._taken[gather.fqns] = gather.full.clone()
        self._owner = _none
        return bool(self._taken)

    def start(self, fqns: Fqns, start: Callable[[], object]) -> None:
        """The start of a gather in a forward that finds some started."""
        if fqns not in self._taken:
            start()

    def wait(self, fqns: Fqns, wait: Callable[[], object], full: torch.Tensor) -> None:
        """Its wait."""
        copy = self._taken.pop(fqns, None)
        if copy is None:
            wait()
        else:
            full.copy_(copy)

    def drop(self) -> None:
        """Wait for all, and do without them. To be called on all ranks alike."""
        if not self._flying:
            return
        flying, self._flying = self._flying, []
        self._owner, self._waiting = _none, None
        for gather, _ in flying:
            gather.wait()

    def forget(self) -> None:
        """After an error, which left nothing in flight."""
        self._flying, self._owner, self._waiting = [], _none, None
        self._taken.clear()

    def _ids_of(self, fqns: Fqns) -> list[int]:
        return [self._ids[fqn] for fqn in fqns]

    def _stamp(self, fqns: Fqns) -> Stamp:
        """What changes when a parameter of a bucket is changed in place, or replaced, on all ranks alike.

        A rank that has none of a replaced parameter has no other way to see it than the storage.
        """
        params = [self._params[fqn] for fqn in fqns]
        return [(param._version, compat.storage_id(param)) for param in params]
