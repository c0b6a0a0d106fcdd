"""Parts of a compiled model outside of its step, where a parameter is a shard and computes nothing right.

A step is traced with whole stand-ins for the parameters. So code that finds the model's own Parameter objects runs
outside. A part that is called there gathers its parameters, where no gradient is to come back to them; else it is
refused by its name, as its state dict is. Loading is done from whole tensors.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.errors import FxzeroError
from fxzero.module.methods.gathered import fqns_of, gathered
from fxzero.module.sharded_model import ShardedModel
from fxzero.module.wrappers import allow_wrappers
from fxzero.torch_internals import tree_leaves


def watch_parts(sharded: ShardedModel, compiled: nn.Module) -> None:
    """Refuse calls and state dicts of the parts of a model from now on, and load whole tensors into its shards.

    Args:
        compiled: the module that stands for the model; it loads as the model does where a parent loads.
    """
    vars(compiled)[torch_internals.LOAD] = functools.partial(load_part, sharded, sharded.model, "")
    held = weakref.ref(sharded)
    for path, module in sharded.model.named_modules():
        at = weakref.ref(module)
        if next(module.parameters(), None) is not None:
            module.__dict__[torch_internals.CALL] = functools.partial(_call, held, at, path)
            module.__dict__[COPY] = functools.partial(_copy, held, at, path)
        if any(param is not None for param in torch_internals.tensor_tables(module)[0].values()):
            module.__dict__[torch_internals.SAVE] = functools.partial(_save, held, at, path)
            module.__dict__[torch_internals.LOAD] = functools.partial(_load, held, at, path)


_initialised: list[weakref.ref[ShardedModel]] = []
"""The models whose shards no initialiser of torch may fill."""


def watch_initialisers(sharded: ShardedModel) -> None:
    """Refuse `torch.nn.init` on the shards of a model, where it depends on shapes, or draws on several ranks."""
    _initialised[:] = [each for each in _initialised if each() is not None]
    _initialised.append(weakref.ref(sharded))
    _wrap_initialisers()


@functools.cache
def _wrap_initialisers() -> None:
    """Two functions serve all models, and are never removed."""
    torch_internals.wrap_initialisers(_refuse_shape, _refuse_draw)


def _refuse_shape(tensor: Tensor) -> None:
    if (found := _shard_of(tensor)) is not None:
        raise FxzeroError(
            f"An initialiser looks at the shape of {found[1]}, which is a shard here, flat. {_INITIALISE}"
        )


def _refuse_draw(tensor: Tensor) -> None:
    if (found := _shard_of(tensor)) is not None and not found[0].comm.is_alone:
        raise FxzeroError(
            f"An initialiser draws values of {found[1]} on each rank, for this rank's slice alone: with equal seeds "
            f"the slices would have equal values. {_INITIALISE}"
        )


_INITIALISE = (
    "Initialise a model before fxzero.compile, by compile(init_fn=...) where it is on the meta device, or inside of "
    "`with zero.summon_full_params():`, with equal seeds on all ranks."
)


def _shard_of(tensor: Tensor) -> tuple[ShardedModel, str] | None:
    """The model and the name of the parameter whose shard a tensor is, or is a view of; None if it is none."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return None
    for each in _initialised:
        sharded = each()
        shards = None if sharded is None else sharded.shards
        if sharded is None or shards is None or sharded.method_run is not None:  # which gathers what it touches
            continue
        place = tensor.untyped_storage().data_ptr()
        if place in {segment.untyped_storage().data_ptr() for segment in shards.params.segments}:
            return sharded, next((n for n, p in sharded.params.items() if p is tensor), "a parameter")
        fqn = next((n for n, p in sharded.params.items() if p is tensor and n not in sharded.whole), None)
        if fqn is not None:
            return sharded, fqn
    return None


def forget_parts(model: nn.Module) -> None:
    """Undo `watch_parts`."""
    for module in model.modules():
        for name in (torch_internals.SAVE, torch_internals.LOAD, torch_internals.CALL, COPY):
            module.__dict__.pop(name, None)


@contextmanager
def copying_parts(sharded: ShardedModel) -> Generator[None]:
    """Let parts of the model be copied inside of the block."""
    sharded.is_copied = True
    try:
        yield
    finally:
        sharded.is_copied = False


COPY = "__deepcopy__"
"""Where `copy.deepcopy` looks for what copies an object."""


_Held = Callable[[], ShardedModel | None]
_At = Callable[[], nn.Module | None]


def _find(held: _Held, at: _At) -> tuple[ShardedModel, nn.Module]:
    sharded, module = held(), at()
    assert sharded is not None and module is not None
    return sharded, module


def _is_outside(sharded: ShardedModel, module: nn.Module) -> bool:
    """True if the module holds its own Parameter objects as shards, and no stand-ins for them."""
    own = {id(param) for param in torch_internals.tensor_tables(module)[0].values()}
    if sharded.whole:
        own -= {id(sharded.params[fqn]) for fqn in sharded.whole}
    return not sharded.ids.isdisjoint(own)


def _call(held: _Held, at: _At, path: str, *args: Any, **kwargs: Any) -> Any:
    sharded, module = held(), at()
    assert module is not None
    own = torch_internals.own_method(module, torch_internals.CALL)
    if sharded is None:  # the compiled module is gone
        return own(*args, **kwargs)
    run = sharded.method_run
    all_are_whole = len(sharded.whole) == len(sharded.params)
    if (all_are_whole and not torch.is_grad_enabled()) or not sharded.has_shards_in(module):
        return own(*args, **kwargs)
    needs_graph = torch.is_grad_enabled() and _may_get_grad(module, (args, kwargs))
    fqns = fqns_of(sharded, module)
    if not needs_graph and sharded.whole.issuperset(fqns):
        return own(*args, **kwargs)
    if run is not None:
        if needs_graph and not path:
            return run.on_model(args, kwargs)
        run.on_part(path or "the model", needs_graph=needs_graph)
    if not path and sharded.phases.block:
        raise FxzeroError(
            f"The model was called inside of `with zero.{sharded.phases.block}`, with gradients or with shards among "
            "its parameters. Call it under torch.no_grad(), with all parameters gathered, or leave the block."
        )
    if not path:
        return own(*args, **kwargs)  # its forward refuses
    if needs_graph:
        raise FxzeroError(
            f"{path} is a part of a model that fxzero.compile took over, and was called by itself (zero.{path}) with "
            "gradients: its parameters are shards here. Call it in a method of the model, which is trained as forward "
            "is (zero.encode(x)), or under torch.no_grad(), where it gathers its parameters."
        )
    with gathered(sharded, fqns, path):
        return own(*args, **kwargs)


def _copy(held: _Held, at: _At, path: str, memo: dict[int, Any]) -> nn.Module:
    """A copy of a part, which belongs to no compiled model; its parameters must be whole."""
    sharded, module = held(), at()
    assert module is not None
    if sharded is not None and not sharded.is_copied:
        shards = {id(param) for fqn, param in sharded.params.items() if fqn not in sharded.whole}
        if not shards.isdisjoint(map(id, module.parameters())):
            raise FxzeroError(
                f"A copy of {path or 'the model'} would have this rank's shards as parameters. Copy it as "
                "`with zero.summon_full_params(): copy.deepcopy(...)`, or the compiled module by copy.deepcopy(zero)."
            )
    own = module.__dict__.pop(COPY)
    if not hasattr(type(module), COPY):  # else wrappers that pass on what they lack, as peft's, copy what they wrap
        module.__dict__[COPY] = None
    try:
        copied = copy.deepcopy(module, memo)
    finally:
        module.__dict__[COPY] = own
    copied.__dict__.pop(COPY, None)
    if sharded is None or not sharded.is_copied:
        forget_parts(copied)
        allow_wrappers(copied)
        for each in copied.modules():
            each.__dict__.pop(torch_internals.CONVERSION, None)
    return copied


def _may_get_grad(module: nn.Module, arguments: Any) -> bool:
    leaves = tree_leaves(arguments)
    given = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    return given or any(param.requires_grad for param in module.parameters())


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
    params = {name: param for name, param in table.items() if id(param) in sharded.ids}
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


def check_scalar(name: str, sharded: ShardedModel) -> None:
    """Refuse to read a scalar parameter as an attribute where its only element lies on one of several ranks.

    Raises:
        FxzeroError: with the ways to read and to change it.
    """
    spec = sharded.specs.get(name)
    if spec is None or name in sharded.whole:
        return
    if spec.shape == () and sharded.shards is not None and not sharded.comm.is_alone:
        raise FxzeroError(
            f"{name} is a scalar parameter, whose only element lies on one rank: it cannot be computed with outside of "
            f"forward. Return what you need from forward; read it by zero.state_dict()[{name!r}], on every rank; to "
            f"change it in place, take dict(zero.named_parameters())[{name!r}]."
        )
