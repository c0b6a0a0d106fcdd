"""Take over the user's own model: refuse its methods that would run, copy, save or convert the shards.

The model stays the same object. The refusals are attributes of the instance, so that they can be taken back.
"""

import functools
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from fxzero import torch_internals
from fxzero.errors import FxzeroError, InputMismatchError
from fxzero.module.parts import COPY, forget_parts
from fxzero.module.sharded_model import ShardedModel
from fxzero.module.wrappers import allow_wrappers, refuse_wrappers

_TAKEN = "_fxzero_taken"
"""The attribute of a taken model that keeps the instance attributes which its refusals hide."""
_CLASS_FORWARD = "_fxzero_forward"
"""The attribute of a taken model that keeps the forward of its class."""
_CALL = (
    "fxzero.compile took this model over: its parameters are shards. Call the module that compile returned; to run "
    "the plain model (generate, export), load the gathered weights into a new one: "
    "plain.load_state_dict(zero.state_dict())."
)
_STATE = (
    "fxzero.compile took this model over: its own state dict has but this rank's shards. Use that of the module which "
    "compile returned, on every rank: zero.state_dict(), zero.load_state_dict(...). To save in the format of a "
    "library, pass it on: model.save_pretrained(path, state_dict=zero.state_dict())."
)
_NO_COPY = (
    "A compiled model cannot be pickled, and the model in it not be copied: its parameters are views of one buffer of "
    "this rank. Copy what compile returned, copy.deepcopy(zero), on all ranks; or load zero.state_dict() elsewhere."
)


def refuse(text: str) -> Callable[..., NoReturn]:
    """A function or method that raises FxzeroError with this text."""

    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise FxzeroError(text)

    return refused


refuse_copy = refuse(_NO_COPY)
"""Stands in for `__reduce_ex__`, which copy and pickle call."""
refuse_call = refuse(_CALL)
"""Stands in for the forward of a model."""
_REFUSALS = {
    "forward": refuse_call,
    "state_dict": refuse(_STATE),
    "load_state_dict": refuse(_STATE),
    "__reduce_ex__": refuse_copy,
}
_taken: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models that are taken over."""


def check_model(model: object) -> None:
    """Refuse an object that cannot be taken over.

    Raises:
        InputMismatchError: it is no nn.Module, a part of it is compiled already (by torch.compile too) or wrapped for
            data parallelism, or it shares a parameter with another compiled model.
    """
    if not isinstance(model, nn.Module):
        raise InputMismatchError(f"fxzero.compile takes an nn.Module, not a {type(model).__qualname__}.")
    for name, module in model.named_modules():
        part = f"{name} of this model" if name else "This model"
        if _TAKEN in module.__dict__ or "_fxzero_model" in module.__dict__:
            raise InputMismatchError(
                f"{part} was given to fxzero.compile already. Use the module that it returned, and compile a model as "
                "a whole."
            )
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise InputMismatchError(f"{part} is a {type(module).__name__}. Compile the module inside it: .module.")
        if type(module).__name__ == "TopLevelTracedModule":
            raise InputMismatchError(
                f"{part} was made by torch.jit.trace, which keeps its parameters to itself. Give fxzero.compile the "
                "module as it was before, or torch.jit.script(module)."
            )
        if torch_internals.compiled_itself(module) or (not name and torch_internals.is_compiled(module)):
            raise InputMismatchError(
                f"{part} was compiled by torch.compile, which a trace cannot follow. Give fxzero.compile the module as "
                "it was before torch.compile(module) or module.compile(). A submodule may be torch.compile(submodule)."
            )
    own = {id(param): name for name, param in model.named_parameters()}
    for other in _taken:
        shared = next((name for name, param in other.named_parameters() if id(param) in own), None)
        if shared is not None:
            raise InputMismatchError(
                f"{shared} of a {type(other).__name__} that was given to fxzero.compile is a parameter of this model "
                "too. A parameter belongs to one compiled model: compile one that contains both."
            )


def take_over(model: nn.Module) -> None:
    """Refuse calls, copies and state dicts of the model from now on, and conversions of any part of it."""
    model.__dict__[_TAKEN] = {name: model.__dict__[name] for name in _REFUSALS if name in model.__dict__}
    model.__dict__.update(_REFUSALS)
    model.__dict__[_CLASS_FORWARD] = type(model).forward
    _taken.add(model)
    refuse_wrappers(model)
    for module in model.modules():
        module.__dict__[torch_internals.CONVERSION] = _refuse_conversion_of(module)


def give_back(model: nn.Module) -> None:
    """Undo `take_over`."""
    _taken.discard(model)
    allow_wrappers(model)
    own = model.__dict__.pop(_TAKEN)
    del model.__dict__[_CLASS_FORWARD]
    for name in _REFUSALS:
        del model.__dict__[name]
    model.__dict__.update(own)
    for module in model.modules():
        del module.__dict__[torch_internals.CONVERSION]
    forget_parts(model)


@contextmanager
def forward_set_to(model: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Let `model.forward` be a function inside of the block, where it is another one or refuses calls otherwise."""
    before, model.__dict__["forward"] = model.__dict__["forward"], forward
    try:
        yield
    finally:
        model.__dict__["forward"] = before


@contextmanager
def as_uncompiled(model: nn.Module) -> Generator[None]:
    """Let a model whose parameters are whole be called, saved, loaded and copied inside of the block as before."""
    names = ("forward", "state_dict", "load_state_dict")
    attributes, own = model.__dict__, model.__dict__[_TAKEN]
    copy_part = attributes.get(COPY)
    if copy_part is not None:
        attributes[COPY] = functools.partial(_copy_uncompiled, model, copy_part)
    for name in names:
        del attributes[name]
    attributes.update({name: own[name] for name in names if name in own})
    try:
        yield
    finally:
        attributes.update({name: _REFUSALS[name] for name in names})
        if copy_part is not None:
            attributes[COPY] = copy_part


def _copy_uncompiled(
    model: nn.Module, copy_part: Callable[[dict[int, Any]], nn.Module], memo: dict[int, Any]
) -> nn.Module:
    """A copy of a model whose parameters are whole, which can be compiled by itself."""
    attributes = model.__dict__
    hidden = {name: attributes.pop(name) for name in ("__reduce_ex__", _TAKEN, _CLASS_FORWARD)}
    try:
        return copy_part(memo)
    finally:
        attributes.update(hidden)


def with_own_forward(sharded: ShardedModel, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function during which `model.forward` is the model's own."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with forward_set_to(sharded.model, sharded.forward):
            return function(*args, **kwargs)

    return run


def check_forward(model: nn.Module) -> None:
    """Refuse a model whose forward is another than when it was compiled.

    Raises:
        FxzeroError: its forward was set, on the model or on its class.
    """
    attributes = model.__dict__
    if attributes.get("forward") is not _REFUSALS["forward"] or type(model).forward is not attributes[_CLASS_FORWARD]:
        raise FxzeroError(
            f"The forward of {type(model).__qualname__} was replaced after fxzero.compile, which calls the one "
            "that it had then. Replace it before compile; the methods that it calls, and the forward of parts, may be "
            "replaced later."
        )


def refuse_conversion(module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Refuse a conversion of a module, as `nn.Module._apply` would make it, unless it changes nothing.

    Raises:
        FxzeroError: the conversion would change a dtype or a device.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        before = tensor.new_empty(0)
        try:
            after = convert(before)
        except NotImplementedError:  # out of meta
            after = None
        if after is None or (after.dtype, after.device) != (before.dtype, before.device):
            into = "" if after is None else f" into {_text(after)}"
            raise FxzeroError(
                f"{name} cannot be converted from {_text(before)}{into}: compile fixes dtypes and devices, as all "
                "shards are views of one buffer. Convert the model before fxzero.compile; for a model on the meta "
                "device pass device= to it."
            )


def _refuse_conversion_of(module: nn.Module) -> Callable[..., nn.Module]:
    held = weakref.ref(module)  # the module must not hold itself

    def apply(convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        module = held()
        assert module is not None
        refuse_conversion(module, convert)
        return module

    return apply


def _text(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
