"""Give a model built on the meta device its values, one module at a time.

For each module that owns parameters or buffers on meta, children before parents, only these are made real; everything
else in the model is on meta. Then the initialiser of the module is called, and that of each of its ancestors up to the
root: an ancestor may refine what its children began, and what it does to other modules falls on meta tensors, where it
costs nothing and draws nothing. Each filled parameter is handed over and dropped before the next module's turn.

    def __init__ in eager      child a drawn | child b drawn | parent refines a and b
    here                       child a drawn, parent refines a | child b drawn, parent refines b

So a seed gives the values of eager construction, bit for bit, where each parameter is drawn once and modules are built
in the order of their registration; else it gives others of the same distributions. What a model does to its parameters
outside its initialisers, in `__init__` itself, cannot be repeated.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.errors import CheckpointError
from fxzero.module.registered_tensors import Entry, entries, join, plain_tensors

InitFn = Callable[[nn.Module], object]
"""What a user passes as `init_fn`: called as `model.apply(init_fn)` would call it."""

Chain = tuple[tuple[str, nn.Module], ...]
"""A module and its ancestors up to the root, each with its name."""

_NAN_BYTE = 0xFF
"""Floating tensors of these bytes are NaN in every format: what stays unfilled shows itself."""
_ODD_BYTE = 0xA5
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
    """Find early what `initialize` could not fill.

    Args:
        model: any model; one without meta tensors passes.
        init_fn: the user's initialiser, which is trusted to fill everything until it was called.
        skip: names of parameters and buffers that a checkpoint fills.

    Raises:
        CheckpointError: a tensor on meta is a plain attribute of a module, or a module that owns meta parameters or
            buffers has no way to initialise them.
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


def rng_state(device: torch.device | str) -> Tensor:
    """The state of all generators that initialisers draw from: the CPU's, and that of `device` if it has its own.

    Returns:
        A uint8 tensor on the CPU; on the CPU device it is `torch.get_rng_state()`.
    """
    where = torch.device(device)
    states = [torch.get_rng_state()]
    if where.type != "cpu":
        states.append(torch.get_device_module(where).get_rng_state(where).cpu())
    return torch.cat(states)


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Put the generators into a state that `rng_state(device)` returned."""
    num_cpu_bytes = torch.get_rng_state().numel()
    torch.set_rng_state(state[:num_cpu_bytes].clone())
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[num_cpu_bytes:].clone(), device)


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

    Parameters that are real, or in `skip`, are left as they are, and so are buffers; real parameters must still have
    their full shapes, which initialisers look at.

    A tied parameter is initialised in the turn of the module that registers it first, as if the others had taken it
    over, `head.weight = embedding.weight`; in their turns they draw, as they do when they are built, and what they draw
    is dropped. Every owner has the tensor in each of these turns, so that common ancestors refine it by any name.

    Args:
        model: the model. Its Parameter objects stay, on meta; its meta buffers are replaced by real ones.
        device: where values are made and buffers stay.
        init_fn: called with each module and its ancestors. Default: the `_init_weights(module)` of the nearest ancestor
            that has it, else the module's own `reset_parameters()` or `_reset_parameters()`. What it leaves unfilled
            gets these defaults first, and then init_fn again.
        store: called once for each parameter with its canonical name and full value, which is dropped afterwards.
        skip: names of parameters and buffers that a checkpoint has filled or will fill.
        generator_state: `rng_state(device)` of rank 0. A rank in this state draws on from it, as eager construction
            would; any other rank borrows it, so that all draw the same.

    Raises:
        CheckpointError: an initialiser fails on the meta tensors around its module, or leaves something unfilled. The
            model is then as it was.
    """
    where = torch.device(device)
    buffers: list[tuple[Entry, Tensor]] = []
    turns = _turns(model, skip)
    with _draws_from(generator_state, where), torch.no_grad(), where, _everything_on_meta(model):
        for turn in turns:
            values = _run(turn, where, init_fn)
            for entry in turn.entries:
                value = values.pop(entry.fqn)
                if entry.is_param:
                    store(entry.fqn, value.detach())
                else:
                    buffers.append((entry, value))
                del value
    for entry, value in buffers:
        entry.put(value)


# -- turns ---------------------------------------------------------------------------------------------------------


@contextmanager
def _everything_on_meta(model: nn.Module) -> Generator[None]:
    """Put placeholders on meta for whatever is real, so that no initialiser changes it; take all back afterwards."""
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
    """What gets its values here."""
    borrowed: list[Entry] = field(default_factory=list[Entry])
    """Tied to what another module registered earlier: filled as in eager construction, then dropped."""

    @property
    def module(self) -> nn.Module:
        return self.chain[0][1]


def _children_first(module: nn.Module, path: str, above: Chain, seen: set[nn.Module]) -> Generator[Chain]:
    if module in seen:
        return
    seen.add(module)
    chain = ((path, module), *above)
    for name, child in module.named_children():
        yield from _children_first(child, join(path, name), chain, seen)
    yield chain


def _turns(model: nn.Module, skip: AbstractSet[str]) -> list[_Turn]:
    """What must be initialised, children before parents."""
    turns = {chain[0][1]: _Turn(chain) for chain in _children_first(model, "", (), set())}
    for entry in entries(model):
        if entry.tensor.is_meta and not any(slot.fqn in skip for slot in entry.slots):
            first, *others = dict.fromkeys(slot.module for slot in entry.slots)
            turns[first].entries.append(entry)
            for module in others:
                turns[module].borrowed.append(entry)
    return [turn for turn in turns.values() if turn.entries or turn.borrowed]


def _calls(chain: Chain, index: int, init_fn: InitFn | None) -> list[Callable[[], object]]:
    """The initialisers of one module of a chain, from the most general to the most specific."""
    module = chain[index][1]
    calls: list[Callable[[], object]] = []
    own = torch_internals.own_initialiser(module)
    if own is not None:
        calls.append(own)
    holders = (getattr(above, "_init_weights", None) for _, above in chain[index:])
    holder = next((call for call in holders if callable(call) and _takes_a_module(call)), None)
    if holder is not None:
        calls.append(partial(holder, module))
    if init_fn is not None:
        calls.append(partial(init_fn, module))
    return calls


def _takes_a_module(call: Callable[..., object]) -> bool:
    try:
        inspect.signature(call).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _run(turn: _Turn, device: torch.device, init_fn: InitFn | None) -> dict[str, Tensor]:
    """Initialise one module: its full values by name. Its slots are on meta again afterwards."""
    chain = turn.chain
    calls = [_calls(chain, index, init_fn) for index in range(len(chain))]
    specific = [(above, options[-1]) for above, options in zip(chain, calls, strict=True) if options]
    depth = max(map(len, calls))
    every = [
        (above, options[level])
        for level in range(depth)
        for above, options in zip(chain, calls, strict=True)
        if level < len(options)
    ]
    for entry in (*turn.entries, *turn.borrowed):
        entry.put(_unfilled(entry, device))
    try:
        for attempt in (specific, every):
            for (path, module), call in attempt:
                _call(call, turn, path, module)
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


def _call(call: Callable[[], object], turn: _Turn, path: str, module: nn.Module) -> None:
    alone = f"while only the own parameters and buffers of {_place(*turn.chain[0])} were real"
    try:
        call()
    except Exception as error:
        if isinstance(error, RuntimeError) and "meta" in str(error):
            raise CheckpointError(
                f"The initialiser of {_place(path, module)} failed {alone}: {error}. It reads what other modules own. "
                "Let each module be initialised from itself, pass such an init_fn=, or build on a real device."
            ) from error
        if sys.version_info >= (3, 11):
            error.add_note(f"In the initialiser of {_place(path, module)}, {alone}")
        raise


def _value(entry: Entry, device: torch.device) -> Tensor:
    """What the slot holds after the initialisers, also if they bound another tensor to it."""
    value = entry.slots[0].get()
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
    if tensor.numel() == 0:
        return False
    if tensor.is_meta:
        return True
    filler = _filler(tensor)
    head = _bytes(tensor.reshape(-1)[:1])
    return bool((head == filler).all()) and all(
        bool((chunk == filler).all()) for chunk in _bytes(tensor).split(_SCAN_BYTES)
    )


# -- the same draws on all ranks ---------------------------------------------------------------------------------


@contextmanager
def _draws_from(state: Tensor | None, device: torch.device) -> Generator[None]:
    own = rng_state(device)
    if state is None or torch.equal(own, state):
        yield
        return
    if state.shape != own.shape:
        raise ValueError(f"generator_state has {state.numel()} bytes, rng_state({str(device)!r}) has {own.numel()}")
    set_rng_state(state, device)
    try:
        yield
    finally:
        set_rng_state(own, device)
