"""Give a model built on the meta device its values, one module at a time.

Modules that own parameters or buffers on meta take turns, children before parents. In the turn of a module only its own
parameters and buffers are real; everything else in the model is on meta. Its initialiser is called, then that of each
ancestor up to the root. An ancestor may refine what its children began. Whatever it does to other modules falls on meta
tensors, where it costs nothing and draws nothing. Each parameter is handed over and dropped before the next turn.

    def __init__ in eager      child a drawn | child b drawn | parent refines a and b
    here                       child a drawn, parent refines a | child b drawn, parent refines b

A seed gives the values of eager construction, bit for bit, where each parameter is drawn once and modules are built in
the order of their registration; else the values have the same distributions. Changes that a model makes to its
parameters outside its initialisers, in `__init__` itself, cannot be repeated.
"""

import inspect
import sys
from collections.abc import Callable, Generator
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.draws import drawing_from, rng_state
from fxzero.errors import CheckpointError
from fxzero.module.registered_tensors import Entry, entries, join, plain_tensors

InitFn = Callable[[nn.Module], object]
"""A user's initialiser of one module, for all modules: called as `model.apply(init_fn)` would call it."""

Place = tuple[str, nn.Module]
"""A module behind its name in the model, which is empty for the model itself."""

Chain = tuple[Place, ...]
"""A module, then its ancestors up to the root."""

_NAN_BYTE = 0xFF
"""Fills floating tensors before they are initialised: such bytes are NaN in every format."""
_ODD_BYTE = 0xA5
"""Fills other tensors before they are initialised."""
_SCAN_BYTES = 1 << 20


def _cure(module: nn.Module) -> str:
    return (
        f"Give {_class(module)} a reset_parameters() that fills it, pass init_fn=, load a checkpoint, or build the "
        "model on a real device."
    )


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _place(path: str, module: nn.Module) -> str:
    return f"{_class(module)} ({path or 'the model'})"


# -- public ------------------------------------------------------------------------------------------------------


def check_meta_model(model: nn.Module, init_fn: InitFn | None = None, skip: AbstractSet[str] = frozenset()) -> None:
    """Refuse a model with meta tensors that `initialize` could not fill.

    Args:
        model: any model; one without meta tensors passes.
        init_fn: the user's initialiser. With it, modules without an initialiser of their own pass.
        skip: names of parameters and buffers that a checkpoint fills.

    Raises:
        CheckpointError: a tensor on meta is a plain attribute of a module, or no initialiser is found for a module
            that owns meta parameters or buffers.
    """
    registered = {id(param) for param in model.parameters()}
    for path, module in model.named_modules():
        for name, value in plain_tensors(module):
            if value.is_meta and id(value) not in registered:
                raise CheckpointError(
                    f"{join(path, name)} is on the meta device and a plain attribute of {_class(module)}: nothing can "
                    "give it values. Register it with register_buffer(name, tensor, persistent=False) and fill it in "
                    "reset_parameters(), or make it in forward."
                )
    if init_fn is not None:
        return
    for turn in _turns(model, skip):
        if turn.entries and not any(_calls(turn.chain, index, None) for index in range(len(turn.chain))):
            raise CheckpointError(
                f"{turn.entries[0].fqn} is on the meta device, {_class(turn.module)} has no reset_parameters() or "
                f"_reset_parameters(), and the model no _init_weights(module). {_cure(turn.module)}"
            )


def initialize(
    model: nn.Module,
    *,
    device: torch.device | str,
    init_fn: InitFn | None = None,
    store: Callable[[str, Tensor], None],
    skip: AbstractSet[str] = frozenset(),
    generator_state: Tensor | None = None,
) -> None:
    """Initialise the meta parameters and buffers of `model`, holding one module's own parameters at a time.

    Parameters and buffers that are real, or named in `skip`, are left as they are. Real parameters must still have
    their full shapes, since initialisers look at them.

    A tied parameter gets its values in the turn of the module that registers it first, as in
    `head.weight = embedding.weight`. Its other owners draw in their turns too, as they do in eager construction, and
    their draws are dropped. All owners hold the real tensor in each of these turns, so that a common ancestor can
    refine it by any of its names.

    Args:
        model: the model. Its Parameter objects stay, on meta; its meta buffers are replaced by real ones.
        device: where values are made and buffers stay.
        init_fn: called with each module and its ancestors. Default: the `_init_weights(module)` of the nearest ancestor
            that has it, else the module's own `reset_parameters()` or `_reset_parameters()`. If it leaves a tensor
            unfilled, these defaults are called, then init_fn again.
        store: called once for each parameter with its canonical name and full value, which is dropped afterwards.
        skip: names of parameters and buffers that a checkpoint has filled or will fill.
        generator_state: `rng_state(device)` of rank 0, from which every rank draws. Generators that are in this state
            advance, as in eager construction; those of other ranks are left as they were.

    Raises:
        CheckpointError: an initialiser fails on the meta tensors around its module, or leaves something unfilled. The
            model is then as it was.
    """
    where = torch.device(device)
    buffers: list[tuple[Entry, Tensor]] = []
    turns = _turns(model, skip)
    with _drawing_as_rank0(generator_state, where), torch.no_grad(), where, _everything_on_meta(model):
        for turn in turns:
            values = _run(turn, where, init_fn)
            for entry in turn.entries:
                if entry.is_param:
                    store(entry.fqn, values.pop(entry.fqn).detach())
                else:
                    buffers.append((entry, values[entry.fqn]))
    for entry, value in buffers:
        entry.put(value)


# -- turns ---------------------------------------------------------------------------------------------------------


@contextmanager
def _everything_on_meta(model: nn.Module) -> Generator[None]:
    """Register meta tensors in place of real ones, so that no initialiser changes them; undo it afterwards."""
    found = entries(model)
    try:
        for entry in found:
            if not entry.tensor.is_meta:
                entry.put(entry.like("meta"))
        yield
    finally:
        for entry in found:
            entry.put(entry.tensor)


@dataclass(frozen=True)
class _Turn:
    """One module whose own meta parameters and buffers are initialised together."""

    chain: Chain
    entries: list[Entry] = field(default_factory=list[Entry])
    """Parameters and buffers that get their values in this turn."""
    borrowed: list[Entry] = field(default_factory=list[Entry])
    """Tied parameters that another module registered earlier: filled as in eager construction, then dropped."""

    @property
    def module(self) -> nn.Module:
        return self.chain[0][1]


def _children_first(module: nn.Module, path: str, above: Chain, seen: set[nn.Module]) -> Generator[Chain]:
    seen.add(module)
    chain = ((path, module), *above)
    for name, child in module.named_children():
        if child not in seen:
            yield from _children_first(child, join(path, name), chain, seen)
    yield chain


def _turns(model: nn.Module, skip: AbstractSet[str]) -> list[_Turn]:
    """The turns of all modules that own a tensor to initialise, children before parents."""
    turns = {chain[0][1]: _Turn(chain) for chain in _children_first(model, "", (), set())}
    for entry in entries(model):
        if entry.tensor.is_meta and not any(slot.fqn in skip for slot in entry.slots):
            first, *others = dict.fromkeys(slot.module for slot in entry.slots)
            turns[first].entries.append(entry)
            for module in others:
                turns[module].borrowed.append(entry)
    return [turn for turn in turns.values() if turn.entries or turn.borrowed]


def _calls(chain: Chain, index: int, init_fn: InitFn | None) -> list[Callable[[], object]]:
    """The initialisers that apply to one module of a chain, from the most general to the most specific."""
    module = chain[index][1]
    own = torch_internals.own_initialiser(module)
    holders = (getattr(above, "_init_weights", None) for _, above in chain[index:])
    holder = next((call for call in holders if callable(call) and _takes_a_module(call)), None)
    of_any_module = [partial(call, module) for call in (holder, init_fn) if call is not None]
    return of_any_module if own is None else [own, *of_any_module]


def _takes_a_module(call: Callable[..., object]) -> bool:
    try:
        inspect.signature(call).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _run(turn: _Turn, device: torch.device, init_fn: InitFn | None) -> dict[str, Tensor]:
    """Initialise the tensors of one turn, and return their full values by name; the module is on meta again then."""
    chain = turn.chain
    calls = [[(place, call) for call in _calls(chain, index, init_fn)] for index, place in enumerate(chain)]
    specific = [of_module[-1] for of_module in calls if of_module]
    every = [called for level in zip_longest(*calls) for called in level if called is not None]
    for entry in (*turn.entries, *turn.borrowed):
        entry.put(_unfilled(entry, device))
    try:
        for attempt in (specific, every):
            for place, call in attempt:
                _call(call, turn, place)
            values = {entry.fqn: _value(entry, device) for entry in turn.entries}
            unfilled = [entry for entry in turn.entries if _is_unfilled(values[entry.fqn])]
            if not unfilled:
                return values
    finally:
        for entry in (*turn.entries, *turn.borrowed):
            entry.put(entry.tensor)
    raise CheckpointError(
        f"{unfilled[0].fqn} {tuple(unfilled[0].tensor.shape)} is on the meta device, and no initialiser of "
        f"{_class(turn.module)} or of the modules above it fills it. {_cure(turn.module)}"
    )


def _call(call: Callable[[], object], turn: _Turn, place: Place) -> None:
    alone = f"while only the own parameters and buffers of {_place(*turn.chain[0])} were real"
    try:
        call()
    except Exception as error:
        if isinstance(error, RuntimeError) and "meta" in str(error):
            raise CheckpointError(
                f"The initialiser of {_place(*place)} failed {alone}: {error}. It reads what other modules own. "
                "Let each module be initialised from itself, pass such an init_fn=, or build on a real device."
            ) from error
        if sys.version_info >= (3, 11):
            error.add_note(f"In the initialiser of {_place(*place)}, {alone}")
        raise


def _value(entry: Entry, device: torch.device) -> Tensor:
    """The tensor that the entry's first slot holds after the initialisers, which may have bound another one to it."""
    slot = entry.slots[0]
    value = slot.table.get(slot.name)
    if value is None or value.shape != entry.tensor.shape or value.dtype != entry.tensor.dtype:
        raise CheckpointError(
            f"The initialiser of {entry.fqn} replaced it by {_text(value)}; it was {_text(entry.tensor)}. "
            "Let it write in place."
        )
    return value if value.is_meta else value.to(device)


def _text(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


# -- what nobody filled ------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _filler(tensor: Tensor) -> int:
    return _NAN_BYTE if tensor.is_floating_point() or tensor.is_complex() else _ODD_BYTE


def _unfilled(entry: Entry, device: torch.device) -> Tensor:
    value = entry.like(device)
    vars(value).pop("_is_hf_initialized", None)  # transformers would skip it
    _bytes(value).fill_(_filler(value))
    return value


def _is_unfilled(tensor: Tensor) -> bool:
    """True if no byte was written since `_unfilled`, and for a tensor on meta; False for an empty one."""
    if tensor.is_meta or tensor.numel() == 0:
        return tensor.numel() > 0
    chunks = _bytes(tensor.reshape(-1)[:1]), *_bytes(tensor).split(_SCAN_BYTES)  # mostly the first element will do
    return all(bool((chunk == _filler(tensor)).all()) for chunk in chunks)


# -- the same draws on all ranks ---------------------------------------------------------------------------------


def _drawing_as_rank0(state: Tensor | None, device: torch.device) -> AbstractContextManager[None]:
    own = rng_state(device)
    if state is None or torch.equal(own, state):
        return nullcontext()
    if state.shape != own.shape:
        raise ValueError(f"generator_state has {state.numel()} bytes, rng_state({str(device)!r}) has {own.numel()}")
    return drawing_from(state, device)
