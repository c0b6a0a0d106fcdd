"""Check each optimizer that steps shards before its first step, and move the state that it makes into one buffer."""

import contextlib
import functools
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxzero import torch_internals
from fxzero.checkpoint.pieces import Pieces
from fxzero.errors import OptimizerError
from fxzero.optimizers import made_up
from fxzero.optimizers.classes import check_optimizer, steps_wholes
from fxzero.optimizers.marks import foreign_state, unmark
from fxzero.optimizers.probe import is_probe
from fxzero.optimizers.state import ParamShard, drop_unowned, fits, name_of, parameters_of, rehome_state, text_of
from fxzero.optimizers.state_dicts import Held, StateDict, after_state_dict, before_load, is_whole
from fxzero.optimizers.whole import closures
from fxzero.optimizers.whole.guard import WholeSteps
from fxzero.optimizers.whole.owners import owned_shards
from fxzero.optimizers.whole.state import has_state


class OptimizerGuard:
    """Checks every optimizer that steps parameters of one compiled model, also optimizers built after compile.

    A new guard of an owner replaces the old one; the last guard ends with its owner.

    event (of any optimizer)   condition                         what the guard does
    before_step                there are no shards yet           nothing
                               first step; groups were added;    checks the optimizer, and compares its state with
                               state was loaded                  other ranks; its state will move
    before_unscaling           it holds shards                   lets its gradients be reduced, if they are held
    after_unscaling            it holds shards, or ignored       lets ranks agree on infinities that a scaler has found,
                               parameters                        since they have one scale
    after_step                 its state is to move              moves it into one buffer

    A step in which torch.distributed.checkpoint lets an optimizer make its state (`made_up.py`) is not one of training.

    Args:
        owner: the compiled model; held weakly.
        shards: returns this rank's part of each parameter as `param_shards` does, and nothing before there are shards.
            It must not hold the owner.
        elementwise_optimizer: see `check_optimizer`.
        ignored: returns the ids of the ignored parameters. It must not hold the owner.
        pieces: returns what shows slices to torch.distributed.checkpoint, once there are shards. It must not hold the
            owner.
        compare: compares between ranks what state an optimizer has before its first step, and after a load; raises
            where that differs. It must not hold the owner.
        agree_on_found: lets ranks agree on what a gradient scaler has found: tensors that are not 0 where a gradient is
            not finite. It must not hold the owner.
        fix_layout: makes the shards where there are none, on all ranks; must not hold the owner.
        on_begin: called before each step of any optimizer; must not hold the owner.
        on_step: called after each step of any optimizer with its seconds; must not hold the owner.
        is_together: returns whether all ranks take a step or none. It must not hold the owner.
        before_own_step: called before each step of an optimizer that holds shards, and inside of such a step that holds
            ignored parameters; must not hold the owner.
        after_own_step: called after such a step; must not hold the owner.
        phase: begins a phase of all ranks inside of an optimizer's step; must not hold the owner.
    """

    def __init__(
        self,
        owner: nn.Module,
        shards: Callable[[], Mapping[int, ParamShard]],
        *,
        elementwise_optimizer: bool,
        ignored: Callable[[], Collection[int]] = lambda: (),
        pieces: Callable[[], Pieces | None] = lambda: None,
        compare: Callable[[str], object] = lambda state: None,
        agree_on_found: Callable[[Sequence[torch.Tensor]], object] = lambda found: None,
        on_begin: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
        on_step: Callable[[float], object] = lambda seconds: None,
        is_together: Callable[[], bool] = lambda: False,
        before_own_step: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
        after_own_step: Callable[[], object] = lambda: None,
        phase: Callable[[str], AbstractContextManager[object]] = lambda word: contextlib.nullcontext(),
        fix_layout: Callable[[], object] = lambda: None,
    ) -> None:
        self._compare, self._on_begin, self._on_step = compare, on_begin, on_step
        self._agree_on_found = agree_on_found
        self._before_own_step, self._after_own_step = before_own_step, after_own_step
        self._began_s = 0.0
        self.shards, self.pieces, self.fix_layout = shards, pieces, fix_layout
        self._ignored, self._is_together = ignored, is_together
        self.elementwise_optimizer = elementwise_optimizer
        self._checked: weakref.WeakKeyDictionary[Any, tuple[list[Any], int]] = weakref.WeakKeyDictionary()
        """The list of groups that was checked, which a load replaces, and its length."""
        self._own: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Optimizers that hold shards."""
        self._to_rehome: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Optimizers that are taking their first step, in which they make their state."""
        self._state_nbytes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        """Bytes of the buffer that the state of each optimizer was moved to."""
        self.wholes = WholeSteps(pieces, phase)
        _install_hook()
        _guards[weakref.ref(owner, _forget_guard)] = self

    @property
    def state_nbytes(self) -> int:
        """Bytes of the buffers that optimizer state was moved to."""
        return sum(self._state_nbytes.values())

    def held(self) -> Held:
        """This rank's part of each parameter, with what shows it; empty before there are shards."""
        pieces = self.pieces()
        return {} if pieces is None else {key: (shard, pieces) for key, shard in self.shards().items()}

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """The state of an optimizer was dropped: its next step is its first."""
        self._checked.pop(optimizer, None)
        self._state_nbytes.pop(optimizer, None)

    def before_step(self, optimizer: torch.optim.Optimizer, *, is_training: bool = True) -> None:
        """Check an optimizer in its first step, and again if groups were added or state was loaded.

        Args:
            is_training: False for the step in which torch.distributed.checkpoint lets it make its state.
        """
        self._on_begin(optimizer)
        self._began_s = time.perf_counter()
        groups = optimizer.param_groups
        checked, length = self._checked.get(optimizer, (None, 0))
        if checked is not groups or length != len(groups):
            shards = self.shards()
            self.check(optimizer, shards)
            if shards:
                self._checked[optimizer] = groups, len(groups)
                self._to_rehome.add(optimizer)
                self.wholes.watch(optimizer, shards)
                if next(parameters_of(optimizer, shards), None) is not None:
                    self._own.add(optimizer)
                    hook_state_dicts(optimizer)
                    _warn_of_others(optimizer, shards)
        if is_training and self._is_own(optimizer):
            self._before_own_step(optimizer)
        self.wholes.before_step(optimizer, is_training=is_training)

    def after_step(self, optimizer: torch.optim.Optimizer, *, is_training: bool = True) -> None:
        """Move the state that an optimizer made in its first step into one buffer."""
        self.wholes.after_step(optimizer)
        if is_training:
            self._on_step(time.perf_counter() - self._began_s)
            if self._is_own(optimizer):
                self._after_own_step()
        if optimizer in self._to_rehome:
            self._to_rehome.discard(optimizer)
            self._state_nbytes[optimizer] = rehome_state(
                optimizer, self.shards().keys(), of_wholes=steps_wholes(optimizer)
            )

    def _is_own(self, optimizer: torch.optim.Optimizer) -> bool:
        """True if an optimizer holds shards, or if all ranks step or none and it holds ignored parameters."""
        return optimizer in self._own or (self._is_together() and _holds(optimizer, self._ignored()))

    def before_unscaling(self, optimizer: torch.optim.Optimizer) -> None:
        """A scaler is about to look at the gradients of an optimizer, and to change them."""
        if _holds(optimizer, self.shards()):
            self._on_begin(optimizer)

    def after_unscaling(self, optimizer: torch.optim.Optimizer, found: Sequence[torch.Tensor]) -> None:
        """Let all ranks find what a scaler has found on one of them, so that they skip the same steps."""
        if _holds(optimizer, self.shards()) or _holds(optimizer, self._ignored()):
            self._agree_on_found(found)

    def check(self, optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> None:
        """Refuse an optimizer that would step the shards wrongly, and drop state of whole parameters of other owners.

        Raises:
            OptimizerError: the class is refused, or the optimizer has a parameter twice, state for a full parameter, or
                state of another rank's shards.
        """
        seen: set[int] = set()
        is_whole = steps_wholes(optimizer)
        _refuse_replaced(optimizer)
        for _, param in parameters_of(optimizer, shards):
            spec = shards[id(param)].spec
            if is_whole and spec.is_cut:
                raise OptimizerError(
                    f"{name_of(optimizer)} steps whole matrices, and tensor parallelism has cut {spec.fqn}, of which "
                    "no rank has the whole. Step such parameters with an element-wise optimizer."
                )
            if not seen:
                check_optimizer(optimizer, elementwise_optimizer=self.elementwise_optimizer)
            if id(param) in seen:
                raise OptimizerError(
                    f"{name_of(optimizer)} has {spec.fqn} twice: give each parameter to one group, once."
                )
            seen.add(id(param))
            state: Mapping[str, Any] = optimizer.state.get(param, {})
            for key, value in () if is_whole else state.items():
                if not fits(key, value, param, spec):
                    raise OptimizerError(
                        f"State {key!r} of {spec.fqn} in {name_of(optimizer)} is {text_of(value)}, but its shard here "
                        f"is {text_of(param)}: the optimizer has state for the full parameter. Let compile cut it: "
                        "fxzero.compile(model, optimizer=optimizer)."
                    )
        if seen:
            held = self._held_by(optimizer, shards)
            foreign = foreign_state(optimizer, held)
            self._compare(foreign or f"{name_of(optimizer)} has {'loaded' if has_state(optimizer) else 'no'} state")
            if foreign is not None:
                raise OptimizerError(foreign)
            unmark(optimizer, held)
            drop_unowned(optimizer, held)

    def _held_by(self, optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> Mapping[int, ParamShard]:
        """What this rank has of the state of each parameter."""
        pieces = self.pieces()
        if pieces is None or not steps_wholes(optimizer):
            return shards
        return owned_shards(optimizer, shards, pieces.layout, pieces.rank)


def _holds(optimizer: torch.optim.Optimizer, ids: Collection[int]) -> bool:
    """True if an optimizer steps a parameter with one of these ids."""
    return bool(ids) and any(id(param) in ids for group in optimizer.param_groups for param in group["params"])


def _refuse_replaced(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of DTensors that are the parameters of no model any more.

    Raises:
        OptimizerError: it is one.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            if torch_internals.REPLACED in vars(param):
                raise OptimizerError(
                    f"{name_of(optimizer)} steps a DTensor {tuple(param.shape)}, in whose place fxzero.compile has put "
                    "a shard of its local tensor. Build the optimizer from zero.parameters(), or pass it: "
                    "fxzero.compile(model, optimizer=optimizer)."
                )


_guards: dict[weakref.ref[nn.Module], OptimizerGuard] = {}
"""Maps each compiled model to its guard; a plain dict, since each step of an optimizer goes through it twice.

The hooks serve all guards and are never removed: a hook that was removed with its model, in a garbage collection
during a step, would break torch's loop over the hooks.
"""


def _forget_guard(owner: weakref.ref[nn.Module]) -> None:
    _guards.pop(owner, None)


def _owners() -> list[tuple[nn.Module, OptimizerGuard]]:
    """The compiled models that there are, and their guards."""
    found = [(reference(), guard) for reference, guard in list(_guards.items())]
    return [(owner, guard) for owner, guard in found if owner is not None]


def _warn_of_others(optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> None:
    """Warn if an optimizer of shards steps parameters beside, of which nobody may have averaged the gradients."""
    if all(shard.part.numel == shard.spec.numel for shard in shards.values()):  # this rank is alone
        return
    owners = [owner for owner, guard in _owners() if guard.shards()]
    own = {id(param) for owner in owners for _, param in nn.Module.named_parameters(owner)}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    others = [param for param in params if id(param) not in own and param.requires_grad]
    if others:
        warnings.warn(
            f"{name_of(optimizer)} steps {len(others)} parameters beside those of a compiled module (the first is "
            f"{text_of(others[0])}). Their gradients are those of this rank: compile the module that holds both, or "
            "average them before each step (torch.distributed.all_reduce(param.grad, torch.distributed.ReduceOp.AVG), "
            "or divide the sum on gloo).",
            stacklevel=4,
        )


@functools.cache
def _install_hook() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    torch_internals.watch_unscaling(_before_unscaling, _after_unscaling)


def hook_state_dicts(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of shards give its state to torch.distributed.checkpoint, and take it back, at any layout."""
    if optimizer not in _hooked:
        _hooked.add(optimizer)
        optimizer.register_state_dict_post_hook(_after_state_dict)
        optimizer.register_load_state_dict_pre_hook(_before_load)


_hooked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _held() -> Held:
    return {key: held for guard in list(_guards.values()) for key, held in guard.held().items()}


def _after_state_dict(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict | None:
    return after_state_dict(optimizer, state_dict, _held())


def _before_load(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict | None:
    if is_whole(state_dict):
        params = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for owner, guard in _owners():
            if not guard.shards() and not params.isdisjoint(map(id, owner.parameters())):
                guard.fix_layout()
    return before_load(optimizer, state_dict, _held())


_making_state: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers that make their state because torch.distributed.checkpoint asks for it."""


_owning_nothing: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers of those whose other ranks have all of the state."""


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if is_probe(optimizer):
        return None
    called = closures.called_before(args, kwargs) if steps_wholes(optimizer) and _is_ours(optimizer) else None
    if not optimizer.state and torch_internals.is_making_optimizer_state():
        if has_state(optimizer):  # on other ranks, which take no such step
            _owning_nothing.add(optimizer)
            optimizer.zero_grad()
            return None
        _making_state.add(optimizer)
    is_training = optimizer not in _making_state
    if is_training and made_up.drop(optimizer):
        for guard in list(_guards.values()):
            guard.forget(optimizer)
    for guard in list(_guards.values()):
        guard.before_step(optimizer, is_training=is_training)
    return called


def _is_ours(optimizer: torch.optim.Optimizer) -> bool:
    """True if an optimizer steps a parameter of a compiled model, sharded yet or not."""
    params = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return any(id(param) in params for owner, _ in _owners() for param in owner.parameters())


def _after_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    if is_probe(optimizer):
        return
    if optimizer in _owning_nothing:
        _owning_nothing.discard(optimizer)
        return
    is_training = optimizer not in _making_state
    for guard in list(_guards.values()):
        guard.after_step(optimizer, is_training=is_training)
    if not is_training:
        _making_state.discard(optimizer)
        made_up.note(optimizer)


def _before_unscaling(optimizer: torch.optim.Optimizer) -> None:
    for guard in list(_guards.values()):
        guard.before_unscaling(optimizer)


def _after_unscaling(optimizer: torch.optim.Optimizer, found: Sequence[torch.Tensor]) -> None:
    for guard in list(_guards.values()):
        guard.after_unscaling(optimizer, found)
