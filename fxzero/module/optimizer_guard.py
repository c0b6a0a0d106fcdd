"""Which optimizers can step shards, and how the state they already have becomes that of their shards.

An optimizer that treats every element alike gives the same numbers on a 1-D slice of a parameter as on the whole, bit
for bit. One that looks at the parameter's shape, or at several elements at once, does not.
"""

from __future__ import annotations

import enum
import functools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxzero.errors import OptimizerError
from fxzero.graph.layout import ParamSpec, Slice
from fxzero.module.optimizer_state import rehome_state

ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""The optimizers that are known to be element-wise: these classes, not their subclasses."""

REFUSED: Mapping[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "its directions come from dot products over all parameters, of which a rank has only a part",
    torch.optim.Adafactor: "it factors second moments over the rows and columns of whole matrices",
    torch.optim.Muon: "it orthogonalises whole matrices, and a shard is a 1-D slice of one",
    torch.optim.SparseAdam: "it takes sparse gradients, and gradient shards are dense",
}
"""The optimizers of torch.optim that need what a shard does not have."""

_REBUILD = "Build the optimizer after fxzero.compile, from the parameters of what it returns."
_SCALARS = frozenset({"step", "eta", "mu", "mu_product"})
"""State of one element for the whole parameter, whatever the parameter's shape."""


@dataclass(frozen=True)
class ParamShard:
    """What a rank holds of one parameter: the elements `part` of its `spec.numel`, flattened, on `device`."""

    spec: ParamSpec
    part: Slice
    device: torch.device


def check_optimizer(optimizer: object, *, elementwise_optimizer: bool) -> None:
    """Refuse an optimizer that cannot step shards.

    Args:
        optimizer: any variant (for-loop, foreach, fused, capturable, tensor lr) of the classes in `ELEMENTWISE` passes.
        elementwise_optimizer: the user vouches for any other class, except those in `REFUSED`.

    Raises:
        OptimizerError: the class is refused; the message says why, and what to do.
    """
    kind = type(optimizer)
    if kind in ELEMENTWISE:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"{kind.__module__}.{kind.__qualname__} is not a torch.optim.Optimizer.")
    known = ", ".join(cls.__name__ for cls in ELEMENTWISE)
    for cls, reason in REFUSED.items():
        if isinstance(optimizer, cls):
            raise OptimizerError(f"{kind.__qualname__} cannot step shards: {reason}. Use one of {known}.")
    if not elementwise_optimizer:
        raise OptimizerError(
            f"{kind.__module__}.{kind.__qualname__} is not known to be element-wise, and a shard is a 1-D slice of its "
            "parameter. If its update of an element needs only that element's own gradient and state, pass "
            f"elementwise_optimizer=True to fxzero.compile; else use one of {known}."
        )


def cut_state(optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> None:
    """Cut the state that an optimizer has for full parameters like the parameters themselves.

    A tensor of the parameter's shape becomes a 1-D slice with storage of its own, on the shard's device, so that the
    full one is freed; the accumulators that Adagrad makes for a meta model are made for the shard. Scalars are kept.

    Args:
        optimizer: one that passed `check_optimizer`; it does not matter whether its parameters are cut already.
        shards: what this rank holds of each parameter, by the id of the Parameter object; others are left alone.

    Raises:
        OptimizerError: a state tensor has neither the parameter's shape nor a single element. Nothing was cut then.
    """
    states = [
        (optimizer.state[param], group, shards[id(param)])
        for group, param in _parameters_of(optimizer, shards)
        if param in optimizer.state
    ]
    for state, _, shard in states:
        for key, value in state.items():
            if _kind(key, value, shard.spec) is _Kind.OTHER:
                raise OptimizerError(
                    f"State {key!r} of {shard.spec.fqn} in {_name(optimizer)} is {_text(value)}; only tensors of the "
                    f"parameter's shape {shard.spec.shape} and single elements can be cut into shards. {_REBUILD}"
                )
            if isinstance(value, Tensor) and value.is_meta and type(optimizer) is not torch.optim.Adagrad:
                raise OptimizerError(
                    f"State {key!r} of {shard.spec.fqn} in {_name(optimizer)} is on the meta device, without values. "
                    f"{_REBUILD}"
                )
    for state, group, shard in states:
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_meta:
                state[key] = _make_for_adagrad(optimizer, group, key, value, shard)
            elif _kind(key, value, shard.spec) is _Kind.LIKE_PARAM:
                state[key] = value.reshape(-1)[shard.part.start : shard.part.stop].to(shard.device, copy=True)


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
        for _, param in _parameters_of(optimizer, shards):
            spec = shards[id(param)].spec
            if not seen:
                check_optimizer(optimizer, elementwise_optimizer=self.elementwise_optimizer)
            if id(param) in seen:
                raise OptimizerError(
                    f"{_name(optimizer)} has {spec.fqn} twice: give each parameter to one group, once."
                )
            seen.add(id(param))
            state: Mapping[str, Any] = optimizer.state.get(param, {})
            for key, value in state.items():
                if not _fits(key, value, param, spec):
                    raise OptimizerError(
                        f"State {key!r} of {spec.fqn} in {_name(optimizer)} is {_text(value)}, but its shard here is "
                        f"{_text(param)}: the optimizer has state for the full parameter. Let compile cut it: "
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


_STATE_PER_ELEMENT: Mapping[type[torch.optim.Optimizer], Callable[[dict[str, Any]], int]] = {
    torch.optim.Adadelta: lambda group: 2,
    torch.optim.Adagrad: lambda group: 1,
    torch.optim.Adam: lambda group: 2 + group["amsgrad"],
    torch.optim.AdamW: lambda group: 2 + group["amsgrad"],
    torch.optim.Adamax: lambda group: 2,
    torch.optim.ASGD: lambda group: 1,
    torch.optim.NAdam: lambda group: 2,
    torch.optim.RAdam: lambda group: 2,
    torch.optim.RMSprop: lambda group: 1 + (group["momentum"] > 0) + group["centered"],
    torch.optim.Rprop: lambda group: 2,
    torch.optim.SGD: lambda group: int(group["momentum"] != 0),
}


def state_per_element(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Elements of state that an optimizer will have for each element of a parameter: the most of any group.

    2, as of AdamW, for a class that is not of torch.optim, or while there is no optimizer yet.
    """
    counts = [
        _STATE_PER_ELEMENT.get(type(optimizer), lambda group: 2)(group)
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return max(counts, default=2)


# -- helpers -----------------------------------------------------------------------------------------------------


class _Kind(enum.Enum):
    """What one value in an optimizer's state is to its parameter."""

    LIKE_PARAM = "like_param"
    SCALAR = "scalar"
    OTHER = "other"


def _kind(key: str, value: object, spec: ParamSpec) -> _Kind:
    if not isinstance(value, Tensor):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        return _Kind.OTHER if any(isinstance(item, Tensor) and item.numel() > 1 for item in items) else _Kind.SCALAR
    if value.numel() == 1 and key in _SCALARS:
        return _Kind.SCALAR
    if tuple(value.shape) == spec.shape:
        return _Kind.LIKE_PARAM
    return _Kind.SCALAR if value.numel() == 1 else _Kind.OTHER


def _fits(key: str, value: object, shard: Tensor, spec: ParamSpec) -> bool:
    """Whether a value in the state is one for the shard: of its shape, or one for the whole parameter."""
    if isinstance(value, Tensor) and not value.is_meta and value.shape == shard.shape:
        return True
    return _kind(key, value, spec) is _Kind.SCALAR


def _parameters_of(
    optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The parameters of the compiled model that an optimizer steps, each with its group."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) in shards:
                yield group, param


def _make_for_adagrad(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], key: str, value: Tensor, shard: ParamShard
) -> Tensor:
    """What Adagrad's constructor makes, which it does before any step: on meta for a meta model."""
    if key == "step":
        return torch.zeros((), dtype=value.dtype, device=shard.device if group["fused"] else "cpu")
    initial = optimizer.defaults["initial_accumulator_value"]
    fill = complex(initial, initial) if value.is_complex() else initial
    return torch.full((shard.part.numel,), fill, dtype=value.dtype, device=shard.device)


def _name(optimizer: object) -> str:
    return type(optimizer).__name__


def _text(value: object) -> str:
    return (
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__} of tensors"
    )
