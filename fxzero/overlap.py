"""The optimizer's step while the last reductions are in flight, and the next gathers behind it.

    backward | step: what is there already | wait b1 | step b1 | wait b0 | step b0 | first gathers of the next forward

`backward` returns when its last reduction is on its way. Each optimizer that is element-wise steps its parameters in
parts, as their gradients arrive: the same numbers, bit for bit, as no element's update looks at another. The last part
is left to the optimizer's own `step`, so that hooks, schedulers and its return value see one step. Whatever else looks
at gradients or needs the arena finishes the reductions first. The gathers are those of `early.py`.

Source: PyTorch's optimizer steps inside backward (`register_post_accumulate_grad_hook`); deviation: behind backward, by
whole buckets, so that gradient accumulation, clipping and several optimizers stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fxzero import compat
from fxzero.early import EarlyGathers
from fxzero.errors import FxzeroError, GradientsInFlightError
from fxzero.memory import Arena
from fxzero.residency import Residency
from fxzero.text import bucket_label


class Reduction(NamedTuple):
    """A reduction that backward has started and not waited for."""

    fqns: tuple[str, ...]
    finish: Callable[[], object]
    """Waits for it; afterwards the gradients are in their shards."""
    shard: torch.Tensor
    """Where they go."""


class Overlap:
    """What is in flight between a backward and the next forward of one model.

    Args:
        params: by name.
        residency: is told that the changes to gradients are no one's but ours.
        in_parts: the optimizer classes that may step in parts.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        residency: Residency,
        arena: Arena,
        in_parts: Collection[type[torch.optim.Optimizer]],
    ) -> None:
        self._ids = {fqn: id(param) for fqn, param in params.items()}
        self._residency = residency
        self._in_parts = in_parts
        self.early = EarlyGathers(params, arena)
        self._pending: list[Reduction] = []
        self._versions: list[int] = []
        """Of the gradient shards of those, as they are while nobody else writes to them."""
        self._is_in_closure = False
        """Inside an optimizer's step that runs backward itself, nothing is left in flight."""
        self._put_aside: list[tuple[nn.Parameter, torch.Tensor]] = []
        """Parameters that were stepped before the optimizer's own step, and their gradients."""

    @property
    def are_pending(self) -> bool:
        """True while a reduction is in flight."""
        return bool(self._pending)

    def after_backward(self, tail: Sequence[Reduction], reached: Sequence[str]) -> None:
        """Take over what a backward leaves in flight.

        Args:
            reached: the parameters that it gave gradients.
        """
        self._pending = list(tail)
        self._look()
        if self._is_in_closure:
            self.finish()
        self.early.after_backward(reached)

    def settle(self) -> None:
        """Leave nothing in flight."""
        self.finish()
        self.early.drop()

    def close(self) -> None:
        """Let nothing arrive in memory that is about to be freed, or be taken for what another model waits for."""
        with contextlib.suppress(FxzeroError):
            for reduction in list(self._pending):
                self._complete(reduction)
            self.early.drop()

    def finish(self) -> None:
        """Wait for all reductions.

        Raises:
            GradientsInFlightError: somebody else wrote to one of the gradients meanwhile.
        """
        if not self._pending:
            return
        changed = self._changed()
        self._residency.look()
        for reduction in list(self._pending):
            self._complete(reduction)
        self._residency.end_backward()
        if changed is not None:
            raise GradientsInFlightError(
                f"The gradients of {bucket_label(changed.fqns)} were changed in place while their reduction was in "
                "flight, which overlap_optimizer=True leaves pending after backward: they are lost. Call "
                "zero.wait_for_gradients() before anything but an optimizer's step reads or writes .grad, and again "
                "run forward and backward now."
            )

    def _changed(self) -> Reduction | None:
        """One whose gradients somebody else wrote to."""
        pairs = zip(self._pending, self._versions, strict=True)
        return next((each for each, version in pairs if each.shard._version != version), None)

    def _look(self) -> None:
        self._versions = [each.shard._version for each in self._pending]

    def _complete(self, reduction: Reduction) -> None:
        self._pending.remove(reduction)
        with torch.no_grad():
            reduction.finish()
        self._look()

    # -- a step of an optimizer ----------------------------------------------------------------------------------

    def before_step(
        self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any], *, is_first: bool
    ) -> None:
        """Step all that an optimizer has but the last part, which is left to the step that follows.

        What an optimizer does not have stays in flight. One that steps for the first time and makes its state, takes a
        closure, has hooks of its own or is not known to treat parameters apart gets all gradients first.

        Args:
            args, kwargs: of the step, with the optimizer first.
        """
        self._put_aside.clear()  # of a step that failed
        self._is_in_closure = any(value is not None for value in (*args[1:], *kwargs.values()))
        if not self._pending:
            return
        owned = {id(param) for group in optimizer.param_groups for param in group["params"]}
        parts = [each for each in self._pending if not owned.isdisjoint(self._ids_of(each))]
        step = compat.step_without_hooks(optimizer)
        steps_whole = is_first or type(optimizer) not in self._in_parts or compat.has_step_hooks(optimizer)
        if self._is_in_closure or (parts and (steps_whole or step is None or self._changed() is not None)):
            self.finish()
            return
        if parts and step is not None:
            self._step_in_parts(optimizer, step, owned, parts)

    def _step_in_parts(
        self,
        optimizer: torch.optim.Optimizer,
        step: Callable[[torch.optim.Optimizer], object],
        owned: set[int],
        parts: list[Reduction],
    ) -> None:
        """Step what is there, then each part as it arrives, and put the gradients of all but the last aside."""
        ready = owned.difference(*map(self._ids_of, parts))
        stepped: set[int] = set()
        for number, part in enumerate(parts):
            if ready:
                _step_some(optimizer, step, ready)
                stepped |= ready
            self._complete(part)
            later = parts[number + 1 :]
            ready = owned.intersection(self._ids_of(part)).difference(*map(self._ids_of, later))
        for group in optimizer.param_groups:
            for param in group["params"]:
                if id(param) in stepped and param.grad is not None:
                    self._put_aside.append((param, param.grad))
                    param.grad = None

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After the step of an optimizer, give back the gradients, and start what the next forward gathers first."""
        self._is_in_closure = False
        for param, grad in self._put_aside:
            param.grad = grad
        self._put_aside.clear()
        if self.early.are_due:
            stepped = [id(param) for group in optimizer.param_groups for param in group["params"]]
            self.early.after_step(stepped, is_arena_free=not self._pending)

    def _ids_of(self, reduction: Reduction) -> list[int]:
        return [self._ids[fqn] for fqn in reduction.fqns]


def _step_some(
    optimizer: torch.optim.Optimizer, step: Callable[[torch.optim.Optimizer], object], chosen: Collection[int]
) -> None:
    """Step the parameters with these ids, as if the optimizer had no others."""
    every = [group["params"] for group in optimizer.param_groups]
    try:
        for group, params in zip(optimizer.param_groups, every, strict=True):
            group["params"] = [param for param in params if id(param) in chosen]
        step(optimizer)
    finally:
        for group, params in zip(optimizer.param_groups, every, strict=True):
            group["params"] = params
