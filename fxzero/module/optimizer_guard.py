"""Check each optimizer that steps shards, before its first step, and note what it does to them."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxzero.errors import OptimizerError
from fxzero.module.optimizer_classes import check_optimizer
from fxzero.module.optimizer_state import ParamShard, fits, name_of, parameters_of, rehome_state, text_of


class OptimizerGuard:
    """Checks every optimizer that steps parameters of one compiled model, also those built after compile.

    Optimizers may be built at any time, so it is called before each step of any optimizer. It looks at one in its first
    step, and again when it has more parameter groups; one that holds none of the parameters is ignored. A new guard of
    the same owner replaces the old one, and the last one ends with its owner.

    Args:
        owner: the compiled model; held weakly.
        shards: gives what this rank holds of each parameter, by the id of the Parameter object; empty as long as there
            are no shards, and then nothing is checked. It must not hold the owner.
        elementwise_optimizer: see `check_optimizer`.
        on_step: called after each step of any optimizer, with the seconds it took; must not hold the owner.
    """

    def __init__(
        self,
        owner: nn.Module,
        shards: Callable[[], Mapping[int, ParamShard]],
        *,
        elementwise_optimizer: bool,
        on_step: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._on_step = on_step
        self._began_s = 0.0
        self.shards = shards
        self.elementwise_optimizer = elementwise_optimizer
        self._num_groups_checked: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._to_rehome: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Optimizers that take their first step, in which they make their state."""
        self.state_nbytes = 0
        """Bytes of the buffers that optimizer state was moved to."""
        self._owner = weakref.ref(owner)
        _install_hook()
        _guards[owner] = self

    def remove(self) -> None:
        """Stop checking."""
        owner = self._owner()
        if owner is not None and _guards.get(owner) is self:
            del _guards[owner]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check an optimizer, if that was not done yet."""
        self._began_s = time.perf_counter()
        if self._num_groups_checked.get(optimizer) != len(optimizer.param_groups):
            shards = self.shards()
            self.check(optimizer, shards)
            if shards:
                self._num_groups_checked[optimizer] = len(optimizer.param_groups)
                self._to_rehome.add(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After an optimizer's first step, move the state that it made into one buffer."""
        self._on_step(time.perf_counter() - self._began_s)
        if optimizer in self._to_rehome:
            self._to_rehome.discard(optimizer)
            self.state_nbytes += rehome_state(optimizer, self.shards().keys())

    def check(self, optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> None:
        """Refuse an optimizer that would step the shards wrongly.

        Raises:
            OptimizerError: its class is refused, it has a parameter twice, or it has state for a full parameter.
        """
        seen: set[int] = set()
        for _, param in parameters_of(optimizer, shards):
            spec = shards[id(param)].spec
            if not seen:
                check_optimizer(optimizer, elementwise_optimizer=self.elementwise_optimizer)
            if id(param) in seen:
                raise OptimizerError(
                    f"{name_of(optimizer)} has {spec.fqn} twice: give each parameter to one group, once."
                )
            seen.add(id(param))
            state: Mapping[str, Any] = optimizer.state.get(param, {})
            for key, value in state.items():
                if not fits(key, value, param, spec):
                    raise OptimizerError(
                        f"State {key!r} of {spec.fqn} in {name_of(optimizer)} is {text_of(value)}, but its shard here "
                        f"is {text_of(param)}: the optimizer has state for the full parameter. Let compile cut it: "
                        "fxzero.compile(model, optimizer=optimizer)."
                    )


_guards: weakref.WeakKeyDictionary[nn.Module, OptimizerGuard] = weakref.WeakKeyDictionary()
"""The guard of each compiled model. One hook serves all, and stays: a hook that went with its model, in a garbage
collection in the middle of a step, would break torch's loop over the hooks."""


@functools.cache
def _install_hook() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    for guard in list(_guards.values()):
        guard.before_step(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    for guard in list(_guards.values()):
        guard.after_step(optimizer)


# -- helpers -----------------------------------------------------------------------------------------------------
