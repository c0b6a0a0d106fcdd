"""Parts and methods of a compiled model outside of its step, where a parameter is a shard and computes nothing right.

A step is traced with whole stand-ins for the parameters. So code that finds the model's own Parameter objects runs
outside: a call of a submodule, its state dict, a method other than forward. It is refused by the name of the part. Only
loading is done, from whole tensors.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxzero import torch_internals
from fxzero.errors import FxzeroError
from fxzero.module.sharded_model import ShardedModel
from fxzero.torch_internals import tree_leaves

_CURE = (
    "Call the compiled module, and let forward do it (an argument can choose what it does); or load the gathered "
    "weights into a plain model: plain.load_state_dict(zero.state_dict())."
)
_HARMLESS = frozenset(
    {
        *("__get__", "__set__", "__delete__", "__hash__", "__repr__", "__len__", "size", "dim", "numel", "nelement"),
        *("stride", "storage_offset", "is_contiguous", "element_size", "data_ptr", "untyped_storage", "get_device"),
        *("is_floating_point", "is_complex", "detach", "register_hook", "register_post_accumulate_grad_hook"),
    }
)
"""Names of functions of a tensor that compute nothing with its elements. In-place functions work on shards too."""


def watch_parts(sharded: ShardedModel, compiled: nn.Module) -> None:
    """Refuse calls and state dicts of the parts of a model from now on, and load whole tensors into its shards.

    Args:
        compiled: the module that stands for the model; it loads as the model does where a parent loads.
    """
    vars(compiled)[torch_internals.LOAD] = functools.partial(load_part, sharded, sharded.model, "")
    held = weakref.ref(sharded)
    for path, module in sharded.model.named_modules():
        if any(param is not None for param in torch_internals.tensor_tables(module)[0].values()):
            at = weakref.ref(module)
            module.__dict__[torch_internals.SAVE] = functools.partial(_save, held, at, path)
            module.__dict__[torch_internals.LOAD] = functools.partial(_load, held, at, path)
            if path:
                module.__dict__[torch_internals.CALL] = functools.partial(_call, held, at, path)


def forget_parts(model: nn.Module) -> None:
    """Undo `watch_parts`."""
    for module in model.modules():
        for name in (torch_internals.SAVE, torch_internals.LOAD, torch_internals.CALL):
            module.__dict__.pop(name, None)


_Held = Callable[[], ShardedModel | None]
_At = Callable[[], nn.Module | None]


def _find(held: _Held, at: _At) -> tuple[ShardedModel, nn.Module]:
    sharded, module = held(), at()
    assert sharded is not None and module is not None
    return sharded, module


def _is_outside(sharded: ShardedModel, module: nn.Module) -> bool:
    """True if the module holds its own Parameter objects, and no stand-ins for them."""
    return not sharded.ids.isdisjoint(map(id, torch_internals.tensor_tables(module)[0].values()))


def _call(held: _Held, at: _At, path: str, *args: Any, **kwargs: Any) -> Any:
    sharded, module = _find(held, at)
    if _is_outside(sharded, module):
        raise FxzeroError(
            f"{path} is a part of a model that fxzero.compile took over, and was called by itself (zero.{path}): its "
            f"parameters are shards here. {_CURE}"
        )
    return torch_internals.own_method(module, torch_internals.CALL)(*args, **kwargs)


def _save(held: _Held, at: _At, path: str, *args: Any, **kwargs: Any) -> None:
    sharded, module = _find(held, at)
    if _is_outside(sharded, module):
        raise FxzeroError(
            f"The state dict of {path or 'the model'}, a part of a compiled model, has but this rank's shards. Use "
            "that of the module which compile returned, on every rank: zero.state_dict()."
        )
    torch_internals.own_method(module, torch_internals.SAVE)(*args, **kwargs)


def _load(held: _Held, at: _At, path: str, *args: Any, **kwargs: Any) -> None:
    sharded, module = _find(held, at)
    if _is_outside(sharded, module):
        load_part(sharded, module, path, *args, **kwargs)
    else:
        torch_internals.own_method(module, torch_internals.LOAD)(*args, **kwargs)


def load_part(
    sharded: ShardedModel, module: nn.Module, path: str, state: Any, prefix: str, metadata: Any, *rest: Any
) -> None:
    """Load a module's own tensors as `nn.Module` does, from whole tensors: those of parameters are cut into shards.

    Raises:
        FxzeroError: the parameters have no values yet.
        ValueError: the tensors would replace the shards (`assign=True`).
    """
    if metadata.get("assign_to_params_buffers", False):
        raise ValueError("assign=True would replace the shards. Load with assign=False.")
    if sharded.has_meta_params():
        raise FxzeroError(
            f"{path or 'The model'} is on the meta device, without values. Load the whole model first: "
            "zero.load_state_dict(...)."
        )
    load = torch_internals.own_method(module, torch_internals.LOAD)
    table, shards = torch_internals.tensor_tables(module)[0], sharded.shards
    if shards is None:
        load(state, prefix, metadata, *rest)
        return
    params = {name: param for name, param in table.items() if param is not None}
    whole: dict[str, Tensor] = {}
    for name, param in params.items():
        spec = sharded.specs[sharded.fqn_of(param)]
        whole[name] = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype, device=param.device))
    before = torch_internals.changes_of_each(list(whole.values()), range(len(whole)))
    table.update(whole)
    try:
        load(state, prefix, metadata, *rest)
    finally:
        table.update(params)
    after = torch_internals.changes_of_each(list(whole.values()), range(len(whole)))
    with torch.no_grad():
        for (name, value), was, now in zip(whole.items(), before, after, strict=True):
            if was != now:
                params[name].copy_(shards.cut(sharded.fqn_of(params[name]), value))


class _RefuseShards(TorchFunctionMode):
    """Refuses to compute with shards while a method of the model runs."""

    def __init__(self, method: str, names: Mapping[int, str]) -> None:
        super().__init__()
        self._method, self._names = method, names

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        is_in_place = name.endswith("_") and not name.endswith("__")
        if name not in _HARMLESS and not is_in_place:
            for value in tree_leaves((args, kwargs)):
                if id(value) in self._names:
                    raise FxzeroError(
                        f"{self._method}() computes with {self._names[id(value)]} ({name}), which is a shard outside "
                        f"of forward. {_CURE}"
                    )
        return func(*args, **(kwargs or {}))


def outside_of_forward(name: str, method: Callable[..., Any], sharded: ShardedModel) -> Callable[..., Any]:
    """A method of the model other than forward, which must not compute with shards."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with _RefuseShards(name, {id(param): fqn for fqn, param in sharded.params.items()}):
                return method(*args, **kwargs)
        except FxzeroError as error:
            if name not in str(error):
                raise type(error)(f"In {name}(), outside of forward: {error}") from error
            raise

    return run


def check_scalar(name: str, sharded: ShardedModel) -> None:
    """Refuse to read a scalar parameter as an attribute where its only element lies on one of several ranks.

    Raises:
        FxzeroError: with the ways to read and to change it.
    """
    spec = sharded.specs.get(name)
    if spec is not None and spec.shape == () and sharded.shards is not None and not sharded.comm.is_alone:
        raise FxzeroError(
            f"{name} is a scalar parameter, whose only element lies on one rank: it cannot be computed with outside of "
            f"forward. Return what you need from forward; read it by zero.state_dict()[{name!r}], on every rank; to "
            f"change it in place, take dict(zero.named_parameters())[{name!r}]."
        )
